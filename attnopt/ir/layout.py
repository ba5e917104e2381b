"""Layouts: which logical axes each dimension of a tensor holds, and how layout operations move them.

    [B, L, H*D] with axes  b | q | h d   --reshape-->  b | q | h | d   --permute(0, 2, 1, 3)-->  b | h | q | d

An `Axis` is a logical index with a size. A dimension holds a tuple of axes, outermost first; the empty tuple is a dimension of
size 1. Because reshape, permute and expand only regroup, reorder or drop axes, one algebra covers every way to
spell heads (3-D bmm, 4-D, 5-D grouped, einsum, repeat_kv), read forward from inputs or backward from outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from attnopt.ir.dims import Dim, Shape, divide, product
from attnopt.ir.graph import Node, Value


@dataclass(frozen=True)
class Axis:
    name: str
    size: Dim

    def __str__(self) -> str:
        return self.name


Group = tuple[Axis, ...]
Layout = tuple[Group, ...]


class LayoutMismatch(Exception):
    """Internal: a layout operation does not regroup the known axes. Recognition turns it into a Refusal."""


@dataclass
class AxisSpace:
    """The axes of one attention. Reshapes may split an axis; the split then holds for every layout of the space."""

    splits: dict[Axis, Group] = field(default_factory=dict)

    def resolve_group(self, group: Iterable[Axis]) -> Group:
        result: list[Axis] = []
        for axis in group:
            result += self.resolve_group(self.splits[axis]) if axis in self.splits else (axis,)
        return tuple(result)

    def resolve(self, layout: Layout) -> Layout:
        return tuple(self.resolve_group(group) for group in layout)

    def split(self, axis: Axis, inner: Dim) -> Group:
        """Split an axis into (outer, inner) of the given inner size."""
        outer = divide(axis.size, inner)
        if outer is None:
            raise LayoutMismatch(f"axis {axis.name} of size {axis.size} does not split by {inner}")
        self.splits[axis] = (Axis(f"{axis.name}.0", outer), Axis(f"{axis.name}.1", inner))
        return self.splits[axis]

    def regroup(self, layout: Layout, shape: Shape) -> Layout:
        """The layout after (or before) a reshape to `shape`: the same axes in the same order, in other groups."""
        rest = list(self.resolve_group(axis for group in layout for axis in group))
        groups: list[Group] = []
        for dim in shape:
            group: list[Axis] = []
            wanted: Dim = dim
            while wanted != 1 or (rest and rest[0].size == 1 and not group and dim == 1):
                if not rest:
                    raise LayoutMismatch(f"shape {render(shape)} holds more than the axes {render_layout(layout)}")
                axis = rest.pop(0)
                remaining = divide(wanted, axis.size)
                if remaining is None:
                    inner = divide(axis.size, wanted)
                    if inner is None:
                        raise LayoutMismatch(f"a dimension of {wanted} cuts through axis {axis.name} of size {axis.size}")
                    axis, after = self.split(axis, inner)
                    rest.insert(0, after)
                    remaining = 1
                group.append(axis)
                wanted = remaining
                if dim == 1:
                    break
            groups.append(tuple(group))
        if any(axis.size != 1 for axis in rest):
            raise LayoutMismatch(f"shape {render(shape)} lacks axes {', '.join(map(str, rest))}")
        return tuple(groups)

    def before(self, node: Node, layout: Layout) -> Layout:
        """The layout of a layout node's input, given that of its output."""
        layout = self.resolve(layout)
        source, result = node.inputs[0], node.output
        if source is None or source.shape is None or result.shape is None:
            raise LayoutMismatch("a shape is unknown")
        if node.op == "permute":
            moved: list[Group] = [()] * len(layout)
            for to, start in enumerate(node.attrs["perm"]):
                moved[start] = layout[to]
            return tuple(moved)
        if node.op == "reshape":
            return self.regroup(layout, source.shape)
        lead = len(result.shape) - len(source.shape)  # expand
        return tuple(() if dim == 1 and result.shape[lead + i] != 1 else layout[lead + i] for i, dim in enumerate(source.shape))

    def after(self, node: Node, layout: Layout) -> Layout:
        """The layout of a layout node's output, given that of its input; expand has none (it makes new axes)."""
        if node.output.shape is None:
            raise LayoutMismatch("a shape is unknown")
        if node.op == "permute":
            layout = self.resolve(layout)
            return tuple(layout[i] for i in node.attrs["perm"])
        if node.op == "reshape":
            return self.regroup(layout, node.output.shape)
        raise LayoutMismatch("expand repeats elements")


@dataclass(frozen=True)
class Operand:
    """A value together with the axes that its dimensions hold."""

    value: Value
    layout: Layout

    @property
    def axes(self) -> frozenset[Axis]:
        return frozenset(axis for group in self.layout for axis in group)

    def __str__(self) -> str:
        return f"%{self.value.name}[{render_layout(self.layout)}]"


def size_of(group: Sequence[Axis]) -> Dim:
    return product(axis.size for axis in group)


def render(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def render_layout(layout: Layout) -> str:
    return " | ".join(" ".join(map(str, group)) or "1" for group in layout)
