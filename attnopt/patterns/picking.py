"""One place of an axis of an operand, as a value that no host has yet.

    q [b | s h | q | d]  at s = 1     ->     slice(q)[b | h | q | d]

An operand that is repeated along the axis is read before its repetition, and is then not cut.
"""

from __future__ import annotations

from typing import Any

from attnopt.ir.dims import Shape
from attnopt.ir.graph import Node, Value
from attnopt.ir.layout import Axis, AxisSpace, Layout, LayoutMismatch, Operand, size_of
from attnopt.patterns.operands import candidates


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


Parting = tuple[int, int]  # how many parts, and which one


def parting(node: Node) -> Parting | None:
    """Which of how many equal parts a slice takes of its axis; None where it takes anything else."""
    x, axis = node.inputs[0], node.attrs["axis"]
    if node.op != "slice" or x is None or x.shape is None or node.output.shape is None or node.attrs["step"] != 1:
        return None
    whole, size, start = x.shape[axis], node.output.shape[axis], node.attrs["start"]
    if not isinstance(whole, int) or not isinstance(size, int) or not isinstance(start, int) or not size or whole % size:
        return None
    start = start + whole if start < 0 else start
    return (whole // size, start // size) if start % size == 0 and size < whole else None


def part_of(space: AxisSpace, operand: Operand, axis: Axis, index: int) -> Operand:
    """The operand at one place of an axis, which it then no longer holds. Raises LayoutMismatch where the axis is split."""
    if space.resolve_group((axis,)) != (axis,):
        raise LayoutMismatch(f"the parts of {axis.name} are grouped differently")
    operand = Operand(operand.value, space.resolve(operand.layout))
    if axis not in operand.axes:
        return operand
    kept = tuple(a for a in operand.axes if a != axis and a.size != 1)
    for deeper in candidates(space, operand.value, operand.layout, kept):
        layout = space.resolve(deeper.operand.layout)
        if not any(axis in group for group in layout):  # repeated along the axis: every part reads the same
            return Operand(deeper.operand.value, layout)
    return cut(operand, axis, index)


def cut(operand: Operand, axis: Axis, index: int) -> Operand:
    """A slice of the operand, as nodes that are in no graph yet."""
    value, layout = operand.value, operand.layout
    place = next(i for i, group in enumerate(layout) if axis in group)
    group = layout[place]
    builder = Unwritten(value.name)
    if any(a.size != 1 for a in group[: group.index(axis)]):  # not the outermost: a dimension of its own is needed
        split: Layout = (*layout[:place], *((a,) for a in group), *layout[place + 1 :])
        value = builder.emit("reshape", value, shape=tuple(size_of(g) for g in split), dtype=value.dtype)
        layout, place = split, place + group.index(axis)
        group = layout[place]
    rest = tuple(a for a in group if a != axis)
    size = size_of(rest)
    assert isinstance(size, int)
    shape = tuple(size if i == place else dim for i, dim in enumerate(value.shape or ()))
    value = builder.emit(
        "slice", value, shape=shape, dtype=value.dtype, axis=place, start=index * size, stop=(index + 1) * size, step=1
    )
    return Operand(value, tuple(rest if i == place else g for i, g in enumerate(layout)))
