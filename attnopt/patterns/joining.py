"""Several products of one query, whose scores stand side by side in one softmax, as one product over all the keys.

    softmax(concat([q k1', q k2']))     ->     softmax(q k')                k = concat([k1, k2])
    p[:, :n] v1 + p[:, n:] v2           ->     p v                          v = concat([v1, v2])

A part may lack axes that another one has (global keys beside those of a block): it is repeated along them. The joined keys and
values are nodes that no host has yet; a kernel that reads them writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attnopt.ir.clause import Clause
from attnopt.ir.dims import Dim, Shape
from attnopt.ir.expr import Const
from attnopt.ir.graph import Node, Value
from attnopt.ir.layout import Axis, Group, Layout, Operand
from attnopt.ir.site import arrange
from attnopt.patterns.assembly import Placed, merge_scales
from attnopt.patterns.operands import candidates
from attnopt.patterns.score import NotAttention, Score, ScoreWalk

if TYPE_CHECKING:
    from attnopt.patterns.softmax_attention import SoftmaxAttention

ONE_QUERY = "parts that are products of one query with keys of their own, at one scale"


class Unwritten:
    """A builder of nodes that are in no graph yet: they are written where a kernel reads them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0

    def emit(self, op: str, *inputs: Value | None, shape: Shape, dtype: str = "", **attrs: Any) -> Value:
        self.count += 1
        value = Value(f"{self.name}:joined{self.count}", shape, dtype)
        value.producer = Node(op, inputs, (value,), attrs, name=self.name)
        return value

    def call(self, target: Any, *inputs: Any, shape: Shape, dtype: str = "", **attrs: Any) -> Value:
        raise NotImplementedError("only canonical operations can wait to be written")

    def constant(self, data: Any, dtype: str) -> Value:
        raise NotImplementedError("only canonical operations can wait to be written")


def joined_operands(attempt: SoftmaxAttention, score: Score) -> tuple[Placed, Placed]:
    """(q, its layout) and (k, its layout) where `score` ends at a concat of scores; their scale becomes a term of the score."""
    node, layout = score.product, score.layout
    assert node is not None
    axis = node.attrs["axis"] % len(layout)
    if layout[axis] != attempt.space.resolve_group((attempt.k,)):
        raise NotAttention("the scores are joined along another axis than the keys", node, "scores joined along the keys")
    pieces = part_axes([part.shape[axis] for part in node.inputs if part is not None and part.shape is not None])
    parts: list[tuple[Placed, Placed]] = []
    scales: list[tuple[Clause, ...]] = []
    for part, piece in zip(node.inputs, pieces, strict=True):
        assert part is not None
        walk = ScoreWalk(attempt.space, attempt.load, attempt.activations.strength)
        found = walk.up(part, (*layout[:axis], (piece,), *layout[axis + 1 :]))
        if found.masks or any(t.name != "scale" or not isinstance(t.args[0], Const) for t in found.terms):
            reason = "a part of the joined scores has masks or biases of its own before it is joined"
            raise NotAttention(reason, part.producer or node, "masks and biases that are added to the joined scores")
        if found.product is None or found.product.op != "matmul":
            raise NotAttention("joined scores are joined again", found.product or node, ONE_QUERY)
        parts.append(attempt.product_operands(found.product, found.layout, piece))
        scales.append(merge_scales(found.terms))
    query, factors = common_query(attempt, [q for q, _ in parts], node)
    terms = [merge_scales([Clause("scale", (Const(f),)), *own]) for f, own in zip(factors, scales, strict=True)]
    if any(t != terms[0] for t in terms):
        shown = ", ".join(" ".join(map(str, t)) or "scale(1.0)" for t in terms)
        raise NotAttention(f"the parts of the joined scores differ in scale: {shown}", node, ONE_QUERY)
    score.terms = [*terms[0], *score.terms]
    return query, joined(attempt, [k for _, k in parts], pieces, attempt.k, attempt.d, node)


def part_axes(sizes: Sequence[Dim]) -> list[Axis]:
    """One axis of keys for each part."""
    return [Axis(f"k:{i}", size) for i, size in enumerate(sizes)]


def common_query(attempt: SoftmaxAttention, queries: Sequence[Placed], at: Node) -> tuple[Placed, list[float]]:
    """The nearest value that every part reads as its query, and the factor of each part on it."""
    needed = (attempt.q, attempt.d)
    options = [candidates(attempt.space, *placed, needed, scaling=True) for placed in queries]
    for first in options[0]:
        same = [next((c for c in others if c.operand == first.operand), None) for others in options]
        found = [c for c in same if c is not None]
        if len(found) == len(options):
            return (first.operand.value, first.operand.layout), [c.factor for c in found]
    raise NotAttention("the joined scores are products of different queries", at, ONE_QUERY)


def joined(
    attempt: SoftmaxAttention, parts: Sequence[Placed], pieces: Sequence[Axis], whole: Axis, width: Axis, at: Node
) -> Placed:
    """The parts, each over its piece of the keys, as one value over `whole`; axes that some part has, all have."""
    space = attempt.space
    placed = [Operand(value, space.resolve(layout)) for value, layout in parts]
    channels = space.resolve_group((width,))
    held = {axis for operand in placed for axis in operand.axes} - {*pieces, *channels}
    lead: list[Group] = [(axis,) for group in space.resolve(tuple((a,) for a in attempt.lead)) for axis in group if axis in held]
    builder = Unwritten(at.name)
    made = [arrange(builder, o, [*lead, (piece,), channels], broadcast=True) for o, piece in zip(placed, pieces, strict=True)]
    layout: Layout = (*lead, (whole,), channels)
    shape = (*(axis.size for group in lead for axis in group), whole.size, width.size)
    return builder.emit("concat", *made, shape=shape, dtype=made[0].dtype, axis=len(lead)), layout
