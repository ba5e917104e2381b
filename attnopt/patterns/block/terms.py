"""What each channel of an operand is made of, followed upward through any layout.

    cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin])   ->   channel c:  x[c] * cos[c],  -x[c + 4] * sin[c]   for c < 4, …

A value is a sum of terms. A term is coefficient * factors * one value, with a number for every channel of the operand: which
coordinate of the value it reads along each of its axes. Slices, concatenations and gathers of channels become arithmetic on these
numbers, so every spelling of packing, rotation and interleaving comes out alike, and exactly. Positions stay symbolic axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from attnopt.ir.graph import LAYOUT, Graph, Node, Value
from attnopt.ir.layout import Axis, AxisSpace, Group, Layout, LayoutMismatch
from attnopt.patterns.operands import broadcast_layout

MOST_TERMS = 32  # a rotation in its longest spelling has 8
Numbers = np.ndarray


class NotRead(Exception):
    """Internal: a walk cannot go on. Carries the reason and the node."""

    def __init__(self, reason: str, at: object = None) -> None:
        super().__init__(reason)
        self.reason, self.at = reason, at


@dataclass(frozen=True, eq=False)
class Term:
    """coefficient * product of factors * value, for the channels where mask is true.

    index: for each axis of channels the coordinate that every channel reads; axes without one are positions.
    """

    value: Value
    layout: Layout
    index: Mapping[Axis, Numbers]
    mask: Numbers
    coefficient: float = 1.0
    factors: tuple[Term, ...] = ()

    @property
    def node(self) -> Node | None:
        return self.value.producer


@dataclass
class Walk:
    """Steps upward from terms. `projected` are the values that a linear layer reaches; everything else is a table or a position."""

    projected: set[Value]
    space: AxisSpace = field(default_factory=AxisSpace)
    made: int = 0

    def expand(self, term: Term, stop: Callable[[Term], bool]) -> list[Term]:
        """The terms that a value is the sum of, each as far up as it can be followed or as `stop` allows."""
        done: list[Term] = []
        stack = [term]
        while stack:
            top = stack.pop()
            more = None if top.node is None or stop(top) else self.step(top, top.node)
            stack += more or []
            done += [top] * (more is None)
            if len(stack) + len(done) > MOST_TERMS:
                raise NotRead("more than a rotation stands here", term.node)
        return done[::-1]

    def step(self, term: Term, node: Node) -> list[Term] | None:
        """The terms one node further up; None where the node cannot be crossed."""
        first = node.inputs[0] if node.inputs else None
        if first is None or first.shape is None:
            return None
        try:
            if node.op in LAYOUT:
                return [replace(term, value=first, layout=self.space.before(node, term.layout))]
            if node.op in ("cast", "neg"):
                sign = -1.0 if node.op == "neg" else 1.0
                return [replace(term, value=first, coefficient=sign * term.coefficient)]
            if node.op == "slice":
                return self.cross_slice(term, node, first)
            if node.op == "concat":
                return self.cross_concat(term, node)
            if node.op == "gather":
                return self.cross_gather(term, node, first)
            if node.op == "scatter":
                return self.cross_scatter(term, node, first)
            if node.op in ("mul", "div"):
                return self.cross_factor(term, node)
            if node.op in ("add", "sub"):
                return self.cross_sum(term, node)
        except LayoutMismatch:
            return None
        return None

    # Coordinates.

    def numbers(self, term: Term, axis: Axis) -> Numbers | None:
        """The coordinate of every channel along one axis, also of the parts of a split axis; None for a position."""
        if axis in term.index:
            return term.index[axis]
        for whole, (_, inner) in ((w, p) for w, p in self.space.splits.items() if axis in p):
            known = self.numbers(term, whole)
            if known is None or not isinstance(inner.size, int):
                return None
            return known % inner.size if axis == inner else known // inner.size
        return None

    def coordinate(self, term: Term, dim: int) -> Numbers | None:
        """The coordinate of every channel along one dimension of the value; None where the dimension holds positions.

        The only position of a step of decoding may stand in the dimension of channels: [B, 1, C] and [B, C] are reshaped alike.
        """
        found = np.zeros(len(term.mask), dtype=np.int64)
        axes = [(axis, self.numbers(term, axis)) for axis in self.space.resolve_group(term.layout[dim])]
        if axes and all(numbers is None for _, numbers in axes):
            return None
        for axis, numbers in axes:
            if not isinstance(axis.size, int) or (numbers is None and axis.size != 1):
                return None
            found = found * axis.size + (0 if numbers is None else numbers)
        return found

    def channel(self, term: Term) -> tuple[Numbers, tuple[int, ...]]:
        """One number per channel that says which element of the value's channel dimensions it reads; and those dimensions."""
        dims: list[int] = []
        total = np.zeros(len(term.mask), dtype=np.int64)
        for dim, size in enumerate(term.value.shape or ()):
            found = self.coordinate(term, dim)
            if found is not None and isinstance(size, int):
                total, dims = total * size + found, [*dims, dim]
        return total, tuple(dims)

    def placed(self, term: Term, value: Value, dim: int, numbers: Numbers, mask: Numbers | None = None) -> Term:
        """The term at an input whose dimension `dim` is read at these numbers."""
        self.made += 1
        axis = Axis(f"c{self.made}", (value.shape or ())[dim])
        layout = (*term.layout[:dim], (axis,), *term.layout[dim + 1 :])
        return replace(
            term, value=value, layout=layout, index={**term.index, axis: numbers}, mask=term.mask if mask is None else mask
        )

    # Nodes.

    def cross_slice(self, term: Term, node: Node, source: Value) -> list[Term] | None:
        dim, start, step = node.attrs["axis"], node.attrs["start"], node.attrs["step"]
        found, size = self.coordinate(term, dim), (source.shape or ())[dim]
        if found is None or not isinstance(start, int) or not isinstance(step, int) or not isinstance(size, int) or step < 1:
            return None
        return [self.placed(term, source, dim, found * step + (start + size if start < 0 else start))]

    def cross_concat(self, term: Term, node: Node) -> list[Term] | None:
        dim, at, parts = node.attrs["axis"], 0, []
        found = self.coordinate(term, dim)
        sizes = [None if i is None or i.shape is None else i.shape[dim] for i in node.inputs]
        if found is None or not all(isinstance(size, int) for size in sizes):
            return None
        for value, size in zip(node.inputs, sizes, strict=True):
            mask = term.mask & (found >= at) & (found < at + size)  # type: ignore[operator]
            if mask.any():
                parts.append(self.placed(term, value, dim, np.where(mask, found - at, 0), mask))  # type: ignore[arg-type]
            at += size  # type: ignore[operator]
        return parts

    def cross_gather(self, term: Term, node: Node, source: Value) -> list[Term] | None:
        """A choice of channels by constant numbers; tables that are read by position stay."""
        dim, chosen = node.attrs["axis"], node.inputs[1]
        if chosen is None or chosen.shape is None or len(chosen.shape) > 1 or (read := constant(chosen)) is None:
            return None
        held = read.reshape(-1).numpy()
        if not chosen.shape:
            term = replace(term, layout=(*term.layout[:dim], (), *term.layout[dim:]))
        found, size = self.coordinate(term, dim), (source.shape or ())[dim]
        return None if found is None or not isinstance(size, int) else [self.placed(term, source, dim, held[found] % size)]

    def cross_scatter(self, term: Term, node: Node, held: Value) -> list[Term] | None:
        """Channels that are written over by others, at constant numbers."""
        dim, (_, chosen, new) = node.attrs["axis"], node.inputs
        found, size = self.coordinate(term, dim), (held.shape or ())[dim]
        written = None if chosen is None else counted(chosen)
        if found is None or written is None or new is None or not isinstance(size, int):
            return None
        place = np.full(size, -1)
        place[written] = np.arange(len(written))
        over = term.mask & (place[found] >= 0)
        parts = [self.placed(term, new, dim, np.where(over, place[found], 0), over)] if over.any() else []
        kept = term.mask & ~over
        return parts + ([self.placed(term, held, dim, np.where(kept, found, 0), kept)] if kept.any() else [])

    def cross_factor(self, term: Term, node: Node) -> list[Term] | None:
        left, right = node.inputs
        if left is None or right is None:
            return None
        for main, other in ((left, right), (right, left)):
            if node.op == "div" and main is right:
                break
            number = other.scalar()
            if number is not None and number != 0:
                by = float(number) if node.op == "mul" else 1.0 / float(number)
                return [self.at_input(term, main, coefficient=term.coefficient * by)]
            if node.op == "mul" and main in self.projected and other not in self.projected:
                factor = Term(other, broadcast_layout(other, term.layout), term.index, term.mask)
                return [self.at_input(term, main, factors=(*term.factors, factor))]
        return None

    def cross_sum(self, term: Term, node: Node) -> list[Term] | None:
        left, right = node.inputs
        if left is None or right is None or left not in self.projected or right not in self.projected:
            return None
        sign = -1.0 if node.op == "sub" else 1.0
        return [self.at_input(term, left), self.at_input(term, right, coefficient=sign * term.coefficient)]

    @staticmethod
    def at_input(term: Term, value: Value, **changes: object) -> Term:
        """The term at an input of an element-wise node, which may be broadcast."""
        return replace(term, value=value, layout=broadcast_layout(value, term.layout), **changes)  # type: ignore[arg-type]


def whole(value: Value, layout: Layout, channels: Group, heads: int, width: int) -> Term:
    """The term of an operand itself: channel h * width + d reads head h at d. `channels`: its axes, those of the width last."""
    count = heads * width
    index: dict[Axis, Numbers] = {}
    stride = count
    for axis in channels:
        assert isinstance(axis.size, int)
        stride //= axis.size
        index[axis] = np.arange(count) // stride % axis.size
    return Term(value, layout, index, np.ones(count, dtype=bool))


def projected(graph: Graph) -> set[Value]:
    """Every value that a product with a weight reaches. The outer product of positions and frequencies is no such product."""
    found: set[Value] = set()
    for node in graph.nodes:
        if any(i in found for i in node.inputs) or is_projection(node):
            found.update(node.outputs)
    return found


def constant(value: Value) -> Tensor | None:
    """The data of a constant, also through reshapes of it."""
    if value.load is not None:
        return value.load()
    node = value.producer
    if node is None or node.op != "reshape" or node.inputs[0] is None or not all(isinstance(d, int) for d in value.shape or ()):
        return None
    data = constant(node.inputs[0])
    return None if data is None else data.reshape(value.shape)  # type: ignore[arg-type]


def counted(value: Value) -> Numbers | None:
    """The numbers of a constant vector of indices, also of one that is counted up."""
    made = value.producer
    while made is not None and made.op in ("reshape", "cast") and made.inputs[0] is not None:
        value, made = made.inputs[0], made.inputs[0].producer
    if made is not None and made.op == "iota":
        (count,), start, step = value.shape or (None,), made.attrs["start"], made.attrs["step"]
        return np.arange(count) * step + start if isinstance(count, int) and isinstance(start, int) else None
    data = constant(value)
    return None if data is None else data.reshape(-1).numpy()


def is_projection(node: Node) -> bool:
    """A linear layer, or a product that sums over more than one channel."""
    if node.op == "linear":
        return True
    left = node.inputs[0] if node.op == "matmul" else None
    return left is not None and bool(left.shape) and left.shape[-1] != 1  # type: ignore[index]


def axes(layout: Layout) -> Iterator[Axis]:
    return (axis for group in layout for axis in group)
