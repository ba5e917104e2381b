"""Where the elements of a tensor come from: back through layout operations, slices, joints, paddings and gathers.

    concat(x [B, 2, D], y [B, 4, D])[b, 1 … 3, d]    ->    x[b, 1, d] for the first element, y[b, 0 … 1, d] for the others

Elements are followed together: one index for each dimension, each an `Affine` over all of them. A joint (concat, a padding) parts
them; every part goes on by itself. Nothing is computed here but indices, so what is found holds for whatever the tensors hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from attnopt.ir.dims import Shape, product
from attnopt.ir.graph import Node, Value
from attnopt.patterns.banded.affine import Affine, Numbers, Region, Unreadable, number, size
from attnopt.patterns.lifting.reshaping import matched

CROSSED = ("permute", "reshape", "expand", "slice", "concat", "gather", "cast")


@dataclass(frozen=True, eq=False)
class Elements:
    """Some elements of a value: `which` of those that were asked for, `at` their indices, one for each dimension."""

    value: Value
    at: tuple[Affine, ...]
    which: Numbers

    def select(self, mask: npt.NDArray[np.bool_]) -> Elements:
        """Those for which the mask (over these elements) is true."""
        mask = np.broadcast_to(mask, self.which.shape)
        return replace(self, at=tuple(i.take(mask) for i in self.at), which=self.which[mask])

    def along(self, axis: int, index: Affine) -> tuple[Affine, ...]:
        return (*self.at[:axis], index, *self.at[axis + 1 :])


Stop = Callable[[Elements], bool]


@dataclass(frozen=True)
class Trace:
    """Follows elements for the chunks of one region."""

    region: Region

    def back(self, elements: Elements, stop: Stop) -> Iterator[Elements]:
        """Where the elements come from: the first places where `stop` says so, or which cannot be crossed."""
        if elements.which.size == 0:
            return
        node = elements.value.producer
        if stop(elements) or node is None or node.op not in CROSSED or converts(node):
            yield elements
            return
        try:
            parts = list(self.step(node, elements))
        except Unreadable:
            yield elements
            return
        for part in parts:
            yield from self.back(part, stop)

    def step(self, node: Node, elements: Elements) -> Iterator[Elements]:
        """One node back. Raises Unreadable where its indices are no sums."""
        if node.op == "concat":
            yield from self.joined(node, elements)
            return
        source = node.inputs[0]
        if source is None or source.shape is None or elements.value.shape is None:
            raise Unreadable("a shape is unknown")
        at = elements.at
        undone = before_reshapes(elements.value)
        if undone is not None:
            yield replace(elements, value=undone)
            return
        if node.op == "permute":
            moved = {start: at[to] for to, start in enumerate(node.attrs["perm"])}
            at = tuple(moved[i] for i in range(len(at)))
        elif node.op == "expand":
            at = broadcast(source.shape, elements)
        elif node.op == "reshape":
            at = self.regrouped(at, elements.value.shape, source.shape)
        elif node.op == "slice":
            at = self.sliced(node, elements, source.shape)
        elif node.op == "gather":
            at = self.gathered(node, elements, source.shape)
        yield replace(elements, value=source, at=at)

    def joined(self, node: Node, elements: Elements) -> Iterator[Elements]:
        axis, index, rest = node.attrs["axis"], elements.at[node.attrs["axis"]], elements
        for i, part in enumerate(node.inputs):
            if part is None or part.shape is None:
                raise Unreadable("a shape is unknown")
            length = size(part.shape[axis])
            if i == len(node.inputs) - 1:
                yield replace(rest, value=part, at=rest.along(axis, index))
                return
            inside = np.broadcast_to(self.region.negative(index - length), rest.which.shape)
            here = rest.select(inside)
            if here.which.size:
                yield replace(here, value=part, at=here.along(axis, index.take(inside)))
            rest, index = rest.select(~inside), (index - length).take(~inside)
            if rest.which.size == 0:
                return

    def regrouped(self, at: tuple[Affine, ...], out: Shape, source: Shape) -> tuple[Affine, ...]:
        blocks = matched(out, source)
        if blocks is None:
            raise Unreadable("the sizes do not tell how the dimensions regroup")
        result = [number(0)] * len(source)
        for outs, ins in blocks:
            flat = at[outs[0]]
            for i in outs[1:]:
                flat = flat * whole(out[i]) + at[i]
            for place, axis in enumerate(ins[:-1]):
                stride = whole(product(source[j] for j in ins[place + 1 :]))
                result[axis], flat = self.region.split(flat, stride)
            result[ins[-1]] = flat
        return tuple(result)

    def sliced(self, node: Node, elements: Elements, source: Shape) -> tuple[Affine, ...]:
        axis, start, step = (node.attrs[name] for name in ("axis", "start", "step"))
        if start is None or not isinstance(step, int) or step < 1:
            raise Unreadable("the bounds of a slice are computed")
        first = size(start)
        if isinstance(start, int) and start < 0:
            first = first + size(source[axis])
            if self.region.negative(first).any():
                raise Unreadable("a slice may begin before the first element")
        return elements.along(axis, elements.at[axis] * step + first)

    def gathered(self, node: Node, elements: Elements, source: Shape) -> tuple[Affine, ...]:
        axis, indices = node.attrs["axis"], node.inputs[1]
        if indices is None or indices.shape is None:
            raise Unreadable("a shape is unknown")
        rank = len(indices.shape)
        index = self.counted(indices, elements.at[axis : axis + rank])
        if self.region.negative(index).any():
            raise Unreadable("an index counts from the end")
        return (*elements.at[:axis], index, *elements.at[axis + rank :])

    def counted(self, value: Value, at: tuple[Affine, ...]) -> Affine:
        """One element of a whole-number tensor as a sum: aranges, their sums and multiples, stored tensors."""
        node = value.producer
        if value.load is not None:
            numbers = [i.numbers for i in map(self.region.fixed, at)]
            if any(n is None for n in numbers):
                raise Unreadable("a stored index is read at an open place")
            read = value.load().numpy()[tuple(numbers)] if numbers else value.load().numpy().reshape(1)  # type: ignore[arg-type]
            return Affine({}, read.astype(np.int64))
        if node is not None and node.op == "iota" and isinstance(node.attrs["step"], int):
            return at[0] * node.attrs["step"] + size(node.attrs["start"])
        if node is not None and node.op in ("add", "sub") and value.shape is not None:
            a, b = (self.counted(i, aligned(i.shape or (), value.shape, at)) for i in node.inputs if i is not None)
            return a + b if node.op == "add" else a - b
        if node is not None and node.op in ("permute", "reshape", "expand", "slice", "cast"):
            (part,) = self.step(node, Elements(value, at, np.zeros(1, dtype=np.int64)))
            return self.counted(part.value, part.at)
        raise Unreadable("the indices are computed from data")


def converts(node: Node) -> bool:
    """Whether a cast may change the number: real ones become whole, or true and false."""
    read = node.inputs[0]
    return node.op == "cast" and read is not None and "float" in read.dtype and "float" not in node.output.dtype


def before_reshapes(value: Value) -> Value | None:
    """The tensor of the same shape from which reshapes, one after the other, lead back to this one."""
    source: Value | None = value
    found = None
    while source is not None and source.producer is not None and source.producer.op == "reshape":
        source = source.producer.inputs[0]
        if source is not None and source.shape == value.shape:
            found = source
    return found


def whole(dim: object) -> int:
    if not isinstance(dim, int):
        raise Unreadable(f"the inner size {dim} is no number")
    return dim


def aligned(shape: Shape, out: Shape, at: tuple[Affine, ...]) -> tuple[Affine, ...]:
    """Indices of an input of an element-wise operation: the last dimensions, 0 where they are repeated."""
    lead = len(out) - len(shape)
    return tuple(number(0) if dim == 1 and out[lead + i] != 1 else at[lead + i] for i, dim in enumerate(shape))


def broadcast(shape: Shape, elements: Elements) -> tuple[Affine, ...]:
    return aligned(shape, elements.value.shape or (), elements.at)
