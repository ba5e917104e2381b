"""Scores or weights that a learned matrix mixes across heads  ->  mix(m) before the softmax, weight_mix(m) after it.

    linear(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)          over the heads that a permute brought to the end
    conv2d(scores, w [H, H, 1, 1])                                  heads as channels
    einsum("hg,bgqk->bhqk", w, scores)                              a matmul with a stored square matrix

What a layer adds to each head is a term of the scores, or an option of weight_mix. Hidden keys stay hidden only where every head
hides the same ones, and where no mask acts before the scores are mixed.

Source: "Talking-Heads Attention".
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.dims import Shape
from attnopt.ir.graph import LAYOUT, Node, Value
from attnopt.ir.layout import Axis, Group, Layout, Operand
from attnopt.patterns.rounding import operator

REMEDY = "a square matrix over all heads and nothing else; masks that are the same for every head, after the scores are mixed"


@dataclass(frozen=True)
class Mix:
    """y_o = sum_i m[o, i] x_i + bias_o along dimension `axis` of x.

    m is `matrix`, or its transpose (`turned`), [H, H] or [H, H, 1, 1]. added: the node that adds the bias, where it is another one.
    """

    node: Node
    x: Value
    matrix: Value
    axis: int
    turned: bool = False
    bias: Value | None = None
    added: Node | None = None

    def operand(self, name: str, heads: Group) -> Operand:
        """The matrix [H, H] as an operand of the site; a value that no host has yet where it is arranged first."""
        value, width = self.matrix, (self.node.output.shape or ())[self.axis]
        if len(value.shape or ()) != 2:
            value = made("reshape", name, value, (width, width))
        if self.turned:
            value = made("permute", name, value, (width, width), perm=(1, 0))
        return Operand(value, (heads, heads))

    def added_vector(self, name: str, heads: Group) -> Operand:
        """What is added to each head, [H]."""
        assert self.bias is not None
        shape = ((self.node.output.shape or ())[self.axis],)
        value = self.bias if self.bias.shape == shape else made("reshape", name, self.bias, shape)
        return Operand(value, (heads,))


def made(op: str, name: str, source: Value, shape: Shape, **attrs: object) -> Value:
    """A node that is in no graph yet."""
    value = Value(f"{name}:{op}", shape, source.dtype)
    value.producer = Node(op, (source,), (value,), dict(attrs), name=name)
    return value


def mix_of(node: Node) -> Mix | None:
    """The mix that a node is: a stored square matrix over a dimension that is neither rows nor columns of its input."""
    inputs = [i for i in node.inputs if i is not None]
    if len(inputs) < 2 or node.output.shape is None:
        return None
    first, second = inputs[:2]
    bias = inputs[2] if len(inputs) > 2 else None
    if node.op == "linear" or (node.op == "matmul" and is_stored(second)):
        found = is_square(second) and heads_last(first)
        return Mix(node, first, second, len(node.output.shape) - 1, node.op == "matmul", bias) if found else None
    if node.op == "matmul" and is_stored(first):
        found = is_square(first) and heads_before_pairs(second)
        return Mix(node, second, first, len(node.output.shape) - 2) if found else None
    if node.op == "opaque" and "conv" in operator(node).lower() and is_stored(second):
        shape = second.shape or ()
        pointwise = len(shape) == 4 and shape[0] == shape[1] and shape[2:] == (1, 1) and node.output.shape == first.shape
        return Mix(node, first, second, 1, False, bias) if pointwise else None
    return None


def mixes_heads(node: Node) -> bool:
    return mix_of(node) is not None


def added_to(mix: Mix, node: Node) -> Value | None:
    """What a node adds to each head of what a mix gives: a stored vector over the heads."""
    if node.op != "add" or mix.bias is not None or mix.node.output not in node.inputs or node.output.shape is None:
        return None
    other = next((i for i in node.inputs if i is not mix.node.output), None)
    if other is None or other.shape is None or not is_stored(other) or node.output.shape != mix.node.output.shape:
        return None
    place = mix.axis - (len(node.output.shape) - len(other.shape))
    varies = [i for i, dim in enumerate(other.shape) if dim != 1]
    return other if varies == [place] else None


def is_stored(value: Value) -> bool:
    """Whether it is a weight, arranged in any way."""
    while not value.is_constant:
        node = value.producer
        if node is None or node.op not in LAYOUT or node.inputs[0] is None:
            return False
        value = node.inputs[0]
    return True


def is_square(weight: Value) -> bool:
    shape = weight.shape or ()
    return is_stored(weight) and len(shape) >= 2 and shape[-1] == shape[-2] and all(d == 1 for d in shape[:-2])


def heads_last(value: Value) -> bool:
    """[B, Q, K, H] that a permute made of [B, H, Q, K]."""
    node = value.producer
    while node is not None and node.op in ("reshape", "cast") and node.inputs[0] is not None:
        node = node.inputs[0].producer
    if node is None or node.op != "permute":
        return False
    perm = node.attrs["perm"]
    return len(perm) >= 3 and perm[-1] < len(perm) - 2


def heads_before_pairs(value: Value) -> bool:
    """[B, H, Q * K] that a reshape made of [B, H, Q, K]."""
    node = value.producer
    source = None if node is None or node.op != "reshape" else node.inputs[0]
    return source is not None and source.shape is not None and value.shape is not None and len(source.shape) > len(value.shape)


def over_heads(layout: Layout, axis: int, heads: Group) -> bool:
    """Whether a dimension holds the heads, all of them in their order and nothing else."""
    return wide(layout[axis]) == wide(heads)


def wide(group: Group) -> tuple[Axis, ...]:
    return tuple(axis for axis in group if axis.size != 1)
