"""Which softmaxes of an ATen graph are attention, found without attnopt.

    scores = q @ k', … , p = softmax(scores), … , o = p @ v      ->   the name of the softmax

A softmax is attention where its input reaches back, through element-wise and layout operations, to a product of two activations, and
its output reaches, through such operations, a product with a third. An activation is a float that was computed: from the inputs of
the model with some weight, or from a weight by a layer (the latent queries of a Perceiver). A weight as it is stored, a table, a
mask and a count are none. `scaled_dot_product_attention` is attention by definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, fx

FUSED = {"scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention"}
SOFTMAX = {"softmax", "_softmax", "_safe_softmax", "special_softmax"}
PRODUCTS = {"matmul", "bmm", "mm", "mv", "dot", "einsum", "baddbmm", "tensordot", "inner"}  # of two values of equal standing
LAYERS = {
    "linear", "addmm", "conv1d", "conv2d", "conv3d", "convolution", "layer_norm", "native_layer_norm", "rms_norm", "group_norm",
    "batch_norm", "embedding", "instance_norm", "conv_transpose1d", "conv_transpose2d", *PRODUCTS,
}  # fmt: skip
LAYOUT = {
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "transpose", "permute", "movedim", "t", "expand", "expand_as", "unsqueeze",
    "squeeze", "flatten", "unflatten", "contiguous", "clone", "alias", "detach", "detach_", "lift_fresh_copy", "repeat",
    "repeat_interleave", "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "cat", "concat", "stack", "pad",
    "constant_pad_nd", "roll", "flip", "unfold", "as_strided", "diagonal", "index", "gather", "index_select", "take_along_dim",
    "slice_scatter", "select_scatter", "index_put", "copy", "swapaxes", "tile", "view_copy", "hstack", "vstack", "getitem",
}  # fmt: skip
ELEMENTWISE = {
    "add", "sub", "rsub", "mul", "div", "neg", "where", "masked_fill", "clamp", "clamp_min", "clamp_max", "tanh", "relu", "gelu", "silu",
    "sigmoid", "exp", "log", "pow", "sqrt", "rsqrt", "square", "abs", "maximum", "minimum", "max", "min", "nan_to_num", "to", "_to_copy",
    "type_as", "dropout", "feature_dropout", "addcmul", "leaky_relu", "elu", "softplus", "float", "half", "native_dropout", "hardtanh",
    "threshold", "reciprocal", "fill", "masked_scatter", "tril", "triu", "float_power", "true_divide",
}  # fmt: skip
THROUGH = LAYOUT | ELEMENTWISE


def operation(node: fx.Node) -> str:
    """ "softmax" for aten.softmax.int; "" for what is no operation."""
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "overloadpacket", None)
    name = str(packet.__name__) if packet is not None else getattr(node.target, "__name__", "")
    return name.removesuffix("_") if packet is not None and not name.startswith("_") else name


def values(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads as tensors."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, tuple, list)) or n.op == "get_attr"]


def is_float(node: fx.Node) -> bool:
    made = node.meta.get("val")
    made = made[0] if isinstance(made, (tuple, list)) and made else made
    return isinstance(made, Tensor) and made.is_floating_point()


class Truth:
    """`softmaxes`: names of those that are attention, in order. `all`: of every softmax, attention or not."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.weights: set[fx.Node] = set()
        self.from_inputs: set[fx.Node] = set()
        self.activations: set[fx.Node] = set()
        self.nodes = {node.name: node for node in graph.nodes}
        for node in graph.nodes:
            self.mark(node)
        found = [(node, scores) for node in graph.nodes if (scores := softmax_of(node)) is not None]
        fused = [node for node in graph.nodes if operation(node) in FUSED]
        self.all = tuple(node.name for node, _ in found) + tuple(node.name for node in fused)
        attention = [node for node, scores in found if self.from_product(scores) and self.to_product(node)]
        order = {node: i for i, node in enumerate(graph.nodes)}
        self.softmaxes = tuple(node.name for node in sorted([*attention, *fused], key=order.__getitem__))

    def mark(self, node: fx.Node) -> None:
        """Whether the node is a weight (or a cut of one), whether inputs reach it, and whether it is an activation."""
        read = values(node)
        if (
            is_weight(node)
            if node.op == "get_attr"
            else operation(node) in LAYOUT and read and all(n in self.weights for n in read)
        ):
            self.weights.add(node)
        if node.op == "placeholder" or any(n in self.from_inputs for n in read):
            self.from_inputs.add(node)
        if not is_float(node):
            return
        weights = any(n in self.weights for n in read) and node not in self.weights
        if (
            node.op == "placeholder"
            or any(n in self.activations for n in read)
            or (weights and node in self.from_inputs)
            or (weights and operation(node) in LAYERS - {"embedding"})
        ):
            self.activations.add(node)

    def is_product(self, node: fx.Node) -> bool:
        """A contraction of two activations."""
        if operation(node) not in PRODUCTS:
            return False
        factors = values(node)[-2:] if operation(node) == "baddbmm" else values(node)
        return bool(factors) and all(n in self.activations for n in factors)

    def is_score(self, name: str) -> bool:
        """Whether the value of this name is a product of activations, seen through element-wise and layout operations."""
        node = self.nodes.get(name)
        return node is not None and self.from_product(node)

    def from_product(self, scores: fx.Node) -> bool:
        return any(self.is_product(node) for node in reached([scores], values))

    def to_product(self, weights: fx.Node) -> bool:
        if straight_through(weights):
            return False
        return any(self.is_product(node) for node in reached(weights.users, lambda node: node.users))


def is_weight(node: fx.Node) -> bool:
    """A stored float of more than one number: a parameter, and also a table; those only matter where inputs meet them."""
    value = node.meta.get("val")
    if value is None:
        value = attribute(node)
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1


def attribute(node: fx.Node) -> object:
    value: object = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def reached(starts: Iterable[fx.Node], onward: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """The starts and what is reached from them; nothing is crossed but element-wise and layout operations."""
    stack = list(starts)
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        if operation(node) in THROUGH:
            following = [n for n in onward(node) if n not in seen]
            seen.update(following)
            stack += following


def softmax_of(node: fx.Node) -> fx.Node | None:
    """The scores of a softmax: of the operator itself, of e / sum(e) with e = exp(scores) at its division, of exp(scores - logsumexp)."""
    name, read = operation(node), values(node)
    if name in SOFTMAX:
        return read[0]
    if name == "exp":
        return normalised_before(read[0])
    if name not in ("div", "mul") or len(read) != 2:
        return None
    exponential, total = map(source, read)
    if name == "mul":
        if operation(total) != "reciprocal":
            return None
        total = source(values(total)[0])
    if operation(exponential) != "exp" or operation(total) != "sum":
        return None
    return values(exponential)[0] if source(values(total)[0]) is exponential else None


def normalised_before(exponent: fx.Node) -> fx.Node | None:
    """x, from log_softmax(x) or from x - logsumexp(x)."""
    if operation(exponent) in ("log_softmax", "_log_softmax"):
        return values(exponent)[0]
    if operation(exponent) != "sub" or len(values(exponent)) != 2:
        return None
    scores, total = values(exponent)
    total = source(total)
    return scores if operation(total) == "logsumexp" and source(values(total)[0]) is source(scores) else None


def straight_through(weights: fx.Node) -> bool:
    """hard - p + p, which trains like p and is hard: the softmax itself decides nothing."""
    added = [values(user) for user in weights.users if operation(user) == "add"]
    return any(
        operation(other) == "sub" and source(values(other)[-1]) is weights
        for pair in added
        for other in pair
        if other is not weights
    )


def source(node: fx.Node) -> fx.Node:
    """The value before casts, layout operations, masks and small constants that are added or multiplied."""
    while operation(node) in (
        LAYOUT | {"to", "_to_copy", "add", "clamp", "clamp_min", "mul", "masked_fill", "type_as"}
    ) and values(node):
        node = values(node)[0]
    return node
