"""as_strided, unfold, flip, slice_scatter, select_scatter  ->  gather, concat, slice: what overlapping chunks are made of.

    x [B, 12, D].as_strided([B, 3, 6, D], [s0, 3 * s1, s1, s2])   ->   gather(x, [[0 … 5], [3 … 8], [6 … 11]], axis=1)
    y[:, 2:5] = x                                                 ->   concat(y[:, :2], x, y[:, 5:])

Views over memory are read from the strides that the trace holds; one that does not step along one axis of its input stays opaque.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from attnopt.hosts.fx.rules.access import END, replaced
from attnopt.hosts.fx.rules.layout import Arguments, Rule
from attnopt.ir.dims import Dim, Shape, divide, product, terms_of
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.fx.translate import Translation

Strided = tuple[tuple[Dim, Dim], ...]  # (size, stride) of each dimension


def as_strided(t: Translation, a: Arguments) -> bool:
    value = t.value(a["self"])
    given = a["self"].meta["val"]
    if value is None or value.shape is None or a["storage_offset"] not in (None, given.storage_offset()):
        return False
    source, made = (
        tuple(zip(t.symbols.shape(x), (t.symbols.dim(s) for s in x.stride()), strict=True)) for x in (given, t.node.meta["val"])
    )
    front = 0
    while front < min(len(source), len(made)) - 1 and source[front] == made[front]:
        front += 1
    back = 0
    while back < min(len(source), len(made)) - front - 1 and source[-1 - back] == made[-1 - back]:
        back += 1
    for kept in range(back, -1, -1):  # a dimension beside the chunks may look unchanged although it is a part of them
        inner, outer = source[front : len(source) - kept], made[front : len(made) - kept]
        steps = stepping(inner, outer)
        if steps is not None:
            sizes = tuple(size for size, _ in source)
            whole = (*sizes[:front], product(sizes[front : len(sizes) - kept]), *sizes[len(sizes) - kept :])
            base = value if len(inner) == 1 else t.emit("reshape", value, shape=whole)
            return t.result("gather", base, counted(t, tuple(size for size, _ in outer), steps), axis=front)
    return False


def stepping(inner: Strided, outer: Strided) -> tuple[int, ...] | None:
    """How far each outer dimension steps along the one axis that the inner dimensions are; None where it leaves that axis."""
    if any(stride != product((size, finer)) for (_, stride), (size, finer) in pairwise(inner)):
        return None
    steps = [divide(stride, inner[-1][1]) for _, stride in outer]
    if not all(isinstance(step, int) and step >= 0 for step in steps):
        return None
    rest: dict[tuple[str, ...], int] = {(): sum(map(int, steps)) - 1}  # type: ignore[arg-type]
    sizes = ((product(size for size, _ in inner), 1), *((size, -step) for (size, _), step in zip(outer, steps, strict=True)))  # type: ignore[operator]
    for dim, factor in sizes:
        terms = terms_of(dim)
        if terms is None:
            return None
        for names, c in terms.items():
            rest[names] = rest.get(names, 0) + c * factor
    # What is left behind the last element read; lengths are one or more.
    inside = all(c >= 0 for names, c in rest.items() if names) and sum(rest.values()) >= 0
    return tuple(map(int, steps)) if inside else None  # type: ignore[arg-type]


def counted(t: Translation, sizes: Shape, steps: tuple[int, ...]) -> Value:
    """[i, j, …] -> i * steps[0] + j * steps[1] + …"""
    total: Value | None = None
    for axis, (size, step) in enumerate(zip(sizes, steps, strict=True)):
        count = t.emit("iota", shape=(size,), dtype="int64", start=0, step=step)
        if len(sizes) > 1:
            count = t.emit("reshape", count, shape=tuple(size if i == axis else 1 for i in range(len(sizes))))
        shape = tuple(n if i <= axis else 1 for i, n in enumerate(sizes))
        total = count if total is None else t.emit("add", total, count, shape=shape)
    assert total is not None
    return total


def unfold(t: Translation, a: Arguments) -> bool:
    value, size, step = t.value(a["self"]), a["size"], a["step"]
    if value is None or not value.shape or not isinstance(size, int) or not isinstance(step, int):
        return False
    rank = len(value.shape)
    axis = a["dimension"] % rank
    chunks = t.emit(
        "gather", value, counted(t, (t.shape[axis], size), (step, 1)), shape=replaced(value, axis, t.shape[axis], size), axis=axis
    )
    perm = (*range(axis + 1), *range(axis + 2, rank + 1), axis + 1)
    return t.same(chunks) if perm == tuple(range(rank + 1)) else t.result("permute", chunks, perm=perm)


def flip(t: Translation, a: Arguments) -> bool:
    value = t.value(a["self"])
    if value is None or value.shape is None or not a["dims"]:
        return False
    axes = [axis % len(value.shape) for axis in a["dims"]]
    for axis in axes:
        last = t.symbols.dim(t.node.meta["val"].shape[axis] - 1)
        backwards = t.emit("iota", shape=(t.shape[axis],), dtype="int64", start=last, step=-1)
        if axis == axes[-1]:
            return t.result("gather", value, backwards, axis=axis)
        value = t.emit("gather", value, backwards, shape=t.shape, axis=axis)
    return False


def slice_scatter(t: Translation, a: Arguments) -> bool:
    """What is before, the new part, what is behind."""
    value, new = t.value(a["self"]), t.value(a["src"])
    if value is None or value.shape is None or new is None or new.shape is None or a["step"] != 1:
        return False
    if new.shape == value.shape:
        return t.same(new)
    start, stop = a["start"] or 0, END if a["end"] is None else a["end"]
    return isinstance(start, int) and isinstance(stop, int) and written(t, value, new, a["dim"] % len(value.shape), start, stop)


def written(t: Translation, value: Value, new: Value, axis: int, start: int, stop: int) -> bool:
    """`value` with the part from start to stop of one axis replaced; negative bounds count from the end."""
    assert value.shape is not None and new.shape is not None
    whole, size = t.node.meta["val"].shape[axis], new.shape[axis]
    parts = [new]
    if start:
        before = t.symbols.dim(whole + start) if start < 0 else start
        if before != 0:
            head = t.emit("slice", value, shape=replaced(value, axis, before), axis=axis, start=0, stop=start, step=1)
            parts.insert(0, head)
    if isinstance(whole, int) and isinstance(size, int):  # a bound may lie beyond the end
        end = (start + whole if start < 0 else start) + size
        behind: Dim = whole - end
    elif stop < 0:
        end, behind = stop, -stop
    elif stop >= END:
        end, behind = stop, 0
    else:
        end, behind = stop, t.symbols.dim(whole - stop)
        if start < 0 or size != stop - start:
            return False
    if behind != 0:
        tail = t.emit("slice", value, shape=replaced(value, axis, behind), axis=axis, start=end, stop=None, step=1)
        parts.append(tail)
    return t.result("concat", *parts, axis=axis)


def select_scatter(t: Translation, a: Arguments) -> bool:
    value, new, index = t.value(a["self"]), t.value(a["src"]), a["index"]
    if value is None or value.shape is None or new is None or new.shape is None or not isinstance(index, int):
        return False
    axis = a["dim"] % len(value.shape)
    if value.shape[axis] == 1:
        return t.result("reshape", new)
    apart = t.emit("reshape", new, shape=replaced(value, axis, 1))
    return written(t, value, apart, axis, index, END if index == -1 else index + 1)


RULES: dict[str, Rule] = {
    "aten.as_strided": as_strided,
    "aten.unfold": unfold,
    "aten.flip": flip,
    "aten.slice_scatter": slice_scatter,
    "aten.select_scatter": select_scatter,
}
