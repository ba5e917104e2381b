"""Follow an operand of an attention back to where it is first whole: q, k, v, masks and biases.

    linear -> view -> transpose -> expand -> reshape -> matmul      the operand of the attention is the linear's output

Walking up through layout operations keeps track of the axes. Every value on the way that holds all required axes is a
candidate; the deepest one lets a kernel read the data before it was copied, repeated or transposed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attnopt.ir.graph import LAYOUT, Node, Value
from attnopt.ir.layout import Axis, AxisSpace, Group, Layout, LayoutMismatch, Operand


@dataclass(frozen=True)
class Candidate:
    """A value that can serve as the operand, and the constant factor between it and what the attention reads."""

    operand: Operand
    factor: float = 1.0


def broadcast_layout(value: Value, layout: Layout) -> Layout:
    """The layout of an input of an element-wise operation (or of batched dimensions) whose result has `layout`.

    Dimensions of size 1 that the result repeats hold no axis.
    """
    if value.shape is None:
        raise LayoutMismatch(f"the shape of {value.name} is unknown")
    if len(value.shape) > len(layout):
        raise LayoutMismatch(f"{value.name} has more dimensions than the score it meets")
    aligned = layout[len(layout) - len(value.shape) :]
    return tuple(() if dim == 1 and _size_above_one(group) else group for dim, group in zip(value.shape, aligned, strict=True))


def _size_above_one(group: Group) -> bool:
    return any(axis.size != 1 for axis in group)


def candidates(
    space: AxisSpace, value: Value, layout: Layout, required: Iterable[Axis], *, scaling: bool = False
) -> list[Candidate]:
    """The value itself, then ever deeper sources that still hold every required axis; shallowest first.

    With `scaling`, constant factors are walked through and multiplied up.
    """
    required = tuple(required)
    found = [Candidate(Operand(value, space.resolve(layout)))]
    factor = 1.0
    while (node := value.producer) is not None:
        if node.op in LAYOUT and node.inputs[0] is not None:
            try:
                layout = space.before(node, layout)
            except LayoutMismatch:
                break
            value = node.inputs[0]
        elif scaling and (scaled := constant_factor(node)) is not None:
            value, by = scaled
            factor *= by
            if value.shape is None or len(value.shape) != len(layout):
                break
        else:
            break
        held = {axis for group in space.resolve(layout) for axis in group}
        if held.issuperset(space.resolve_group(required)):
            found.append(Candidate(Operand(value, space.resolve(layout)), factor))
    return [Candidate(Operand(c.operand.value, space.resolve(c.operand.layout)), c.factor) for c in found]


def constant_factor(node: Node) -> tuple[Value, float] | None:
    """(x, c) where the node is x * c, c * x or x / c for one number c."""
    if node.op not in ("mul", "div") or any(i is None for i in node.inputs):
        return None
    left, right = node.inputs
    assert left is not None and right is not None
    if (number := right.scalar()) is not None and number != 0:
        return left, float(number) if node.op == "mul" else 1.0 / float(number)
    if node.op == "mul" and (number := left.scalar()) is not None:
        return right, float(number)
    return None
