"""Products of three activations without a softmax between them: linear attention, named and left as it is.

    phi(q) (phi(k)' v)            relu(q) @ (relu(k)' @ v)                  a state that is read
    (phi(q) phi(k)' . D) v        (q @ k' * decay) @ v                      scores that are weights themselves

The inner product may be scaled, decayed, masked and summed on the way to the outer one. One row for a module: a loop over chunks is
one attention, however many products it unrolls to, and each may read its slice of one product. Recurrences without such products
(Mamba's scan, RWKV) are not seen as attention.
"""

from __future__ import annotations

from collections.abc import Iterator

from attnopt.ir.graph import LAYOUT, Graph, Node, Value
from attnopt.ir.site import Refusal
from attnopt.patterns.activations import SCORE_OPS, Activations
from attnopt.patterns.normalizer import anchors, through_layout
from attnopt.patterns.rounding import operator

FEATURES = ("relu", "exp", "silu", "sigmoid", "gelu", "softmax", "tanh")
REMEDY = "a softmax over the keys; kernels for linear attention are not part of attnopt yet"


def linear_attention(graph: Graph) -> Iterator[Refusal]:
    activations = Activations(graph)
    # Where scores meet a softmax, products of products are part of that attention (Nystromformer's inverse).
    told = {a.node.source.module for a in anchors(graph) if activations.strength(a.scores)} - {""}
    for outer in graph.of("matmul"):
        inner = inner_product(outer, activations)
        where = outer.source.module or outer.name
        if inner is None or where in told:
            continue
        told.add(where)
        reads_state = activations.strength(whole(outer.inputs[0])) < 2  # type: ignore[arg-type]
        form = "phi(q) (phi(k)' v)" if reads_state else "(phi(q) phi(k)') v"
        found = features(outer, inner)
        shown = f", phi = {' and '.join(found)}" if found else ""
        yield Refusal(f"linear attention, left alone: {form} without a softmax{shown}", outer, "product of products", REMEDY)


def inner_product(outer: Node, activations: Activations) -> Node | None:
    """The product of two activations that one side of the node is, where the other side is an activation."""
    sides = [i for i in outer.inputs if i is not None]
    if len(sides) != 2 or not all(i in activations.data for i in sides):
        return None
    strong = [whole(i) for i in sides if activations.strength(whole(i)) == 2]
    if not strong or any(from_softmax(i) for i in sides):
        return None
    inner = product_above(strong[0], activations)
    if inner is None or any(i is None or from_softmax(i) for i in inner.inputs):
        return None
    return inner


def whole(value: Value) -> Value:
    """What a chunk was cut from, where all chunks' products were made at once."""
    before = value
    while (node := before.producer) is not None and (node.op == "slice" or node.op in LAYOUT) and node.inputs[0] is not None:
        before = node.inputs[0]
    return before


def product_above(value: Value, activations: Activations) -> Node | None:
    """The product that a value with `strength` comes from, through what scores may pass."""
    while (node := value.producer) is not None and node.op != "matmul":
        onward = [i for i in node.inputs if i is not None and activations.strength(i) == 2]
        if (node.op not in SCORE_OPS and node.op != "concat") or not onward:
            return None
        value = onward[-1]
    return value.producer


def from_softmax(value: Value) -> bool:
    """Whether weights that a softmax over scores made stand here: then the chain is that attention's, or approximates it."""
    node = through_layout(value).producer
    return node is not None and node.op == "softmax" and node.inputs[0] is not None and made_of_products(node.inputs[0])


def made_of_products(value: Value) -> bool:
    while (node := value.producer) is not None and node.op in SCORE_OPS and node.inputs:
        value = next((i for i in node.inputs if i is not None and not i.is_constant), None)  # type: ignore[assignment]
        if value is None:
            return False
    return value.producer is not None and value.producer.op == "matmul"


def features(outer: Node, inner: Node) -> list[str]:
    """The maps of queries and keys, each named once, as far as they are single operations."""
    names: dict[str, None] = {}
    for value in (*outer.inputs, *inner.inputs):
        if value is not None and (name := feature(value)):
            names[name] = None
    return list(names)


def feature(value: Value) -> str:
    node = through_layout(value).producer
    while node is not None and node.op in (*LAYOUT, "mul", "slice", "cast") and node.inputs[0] is not None:
        node = node.inputs[0].producer
    if node is None:
        return ""
    if node.op == "add":
        inputs = [i for i in node.inputs if i is not None]
        shifted = next((i.producer for i in inputs if i.producer is not None and "elu" in operator(i.producer).lower()), None)
        return "elu + 1" if shifted is not None and any(i.scalar() == 1 for i in inputs) else ""
    return node.op if node.op in FEATURES else ""
