"""Several products of one query, whose scores stand side by side in one softmax, as one product over all the keys.

    softmax(concat([q k1', q k2']))     ->     softmax(q k')                k = concat([k1, k2])
    p[:, :n] v1 + p[:, n:] v2           ->     p v                          v = concat([v1, v2])

A part may lack axes that another one has (global keys beside those of a block): it is repeated along them. The joined keys and
values are nodes that no host has yet; a kernel that reads them writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from attnopt.ir.clause import Clause
from attnopt.ir.dims import Dim
from attnopt.ir.expr import Apply, Const, Expr, Load
from attnopt.ir.graph import Node, Value
from attnopt.ir.layout import Axis, Group, Layout, Operand
from attnopt.ir.site import arrange
from attnopt.patterns.assembly import Placed, merge_scales
from attnopt.patterns.operands import candidates
from attnopt.patterns.picking import Unwritten
from attnopt.patterns.score import NotAttention, Score, ScoreWalk

if TYPE_CHECKING:
    from attnopt.patterns.softmax_attention import SoftmaxAttention

Bias = tuple[Expr, dict[str, Placed]]  # what one part adds to its scores, and what that loads

ALONE = "parts that are scaled, then at most one bias added; masks and further biases on the joined scores"
ONE_QUERY = "parts that are products of one query with keys of their own, at one scale"


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
    biases: list[Bias | None] = []
    for part, piece in zip(node.inputs, pieces, strict=True):
        assert part is not None
        own: dict[str, Placed] = {}
        walk = ScoreWalk(attempt.space, remembered(own), attempt.activations.strength)
        found = walk.up(part, (*layout[:axis], (piece,), *layout[axis + 1 :]))
        scaled = [t for t in found.terms if t.name == "scale" and isinstance(t.args[0], Const)]
        added = [t for t in found.terms[len(scaled) :] if t.name == "add"]
        if found.masks or found.terms[: len(scaled)] != scaled or len(scaled) + len(added) != len(found.terms) or len(added) > 1:
            raise NotAttention(
                "a part of the joined scores is masked or changed before it is joined", part.producer or node, ALONE
            )
        if found.product is None or found.product.op != "matmul":
            raise NotAttention("joined scores are joined again", found.product or node, ONE_QUERY)
        parts.append(attempt.product_operands(found.product, found.layout, piece))
        scales.append(merge_scales(scaled))
        biases.append((added[0].expr(0), own) if added else None)
    query, factors = common_query(attempt, [q for q, _ in parts], node)
    terms = [merge_scales([Clause("scale", (Const(f),)), *own]) for f, own in zip(factors, scales, strict=True)]
    if any(t != terms[0] for t in terms):
        shown = ", ".join(" ".join(map(str, t)) or "scale(1.0)" for t in terms)
        raise NotAttention(f"the parts of the joined scores differ in scale: {shown}", node, ONE_QUERY)
    own_bias = joined_biases(attempt, biases, pieces, node)
    score.terms = [*terms[0], *own_bias, *score.terms]
    return query, joined(attempt, [k for _, k in parts], pieces, attempt.k, (attempt.d,), node)


def remembered(held: dict[str, Placed]) -> Callable[[Value, Layout, str], Expr]:
    """A loader that keeps what it is given in `held`."""

    def load(value: Value, layout: Layout, kind: str) -> Expr:
        name = f"{kind}{len(held)}"
        held[name] = (value, layout)
        return Load(name, ())

    return load


def joined_biases(
    attempt: SoftmaxAttention, biases: Sequence[Bias | None], pieces: Sequence[Axis], at: Node
) -> tuple[Clause, ...]:
    """The biases that parts have of their own, as one over all the keys; a part without one adds nothing."""
    if not any(biases):
        return ()
    builder = Unwritten(f"{at.name}:bias")
    placed = [laid(builder, bias, piece) for bias, piece in zip(biases, pieces, strict=True)]
    dtype = next(value.dtype for value, _ in placed if value.dtype)
    for value, _ in placed:
        value.dtype = value.dtype or dtype
    return (Clause("add", (attempt.load(*joined(attempt, placed, pieces, attempt.k, (), at, builder), "bias"),)),)


def laid(builder: Unwritten, bias: Bias | None, piece: Axis) -> Placed:
    """One part's bias as a value; where it is a number, one that is repeated."""
    expr, held = bias if bias is not None else (Const(0.0), {})
    negative = isinstance(expr, Apply) and expr.op == "neg"
    if isinstance(expr, Apply) and negative:
        expr = expr.args[0]
    if isinstance(expr, Const):
        number = -float(expr.value) if negative else float(expr.value)
        return builder.emit("full", shape=(piece.size,), dtype="", value=number), ((piece,),)
    assert isinstance(expr, Load)
    value, layout = held[expr.operand]
    return (builder.emit("neg", value, shape=value.shape or (), dtype=value.dtype) if negative else value), layout


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
    attempt: SoftmaxAttention,
    parts: Sequence[Placed],
    pieces: Sequence[Axis],
    whole: Axis,
    width: tuple[Axis, ...],
    at: Node,
    builder: Unwritten | None = None,
) -> Placed:
    """The parts, each over its piece of the keys, as one value over `whole`; axes that some part has, all have.

    width: the channels of keys and values; biases have none, and may vary along queries.
    """
    space = attempt.space
    placed = [Operand(value, space.resolve(layout)) for value, layout in parts]
    channels = tuple(space.resolve_group((axis,)) for axis in width)
    held = {axis for operand in placed for axis in operand.axes} - {*pieces, *(axis for group in channels for axis in group)}
    before = attempt.lead if width else (*attempt.lead, attempt.q)
    lead: list[Group] = [(axis,) for group in space.resolve(tuple((a,) for a in before)) for axis in group if axis in held]
    builder = builder or Unwritten(at.name)
    made = [arrange(builder, o, [*lead, (piece,), *channels], broadcast=True) for o, piece in zip(placed, pieces, strict=True)]
    layout: Layout = (*lead, (whole,), *channels)
    shape = (*(axis.size for group in lead for axis in group), whole.size, *(axis.size for axis in width))
    return builder.emit("concat", *made, shape=shape, dtype=made[0].dtype, axis=len(lead)), layout
