"""Slice, Split, Gather, Concat, Range, Trilu, …  ->  slice, gather, concat, iota, full, triangle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.hosts.onnx.lengths import add, quotient
from attnopt.hosts.onnx.rules.layout import Inputs, Rule
from attnopt.ir.dims import Dim
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation

END = 1 << 30  # exporters write "to the end" as some huge number


def replaced(value: Value, axis: int, *sizes: Dim) -> tuple[Dim, ...]:
    shape = value.shape or ()
    return (*shape[:axis], *sizes, *shape[axis + 1 :])


def slice_(t: Translation, x: Inputs) -> bool:
    """One axis; bounds that are not constant stay unknown and the declared shape holds."""
    value = x[0]
    if value is None or value.shape is None:
        return False
    axes = t.held(x[3]) if len(x) > 3 and x[3] is not None else None
    starts, stops = t.vector(x[1]), t.vector(x[2])
    steps = t.vector(x[4]) if len(x) > 4 and x[4] is not None else (1,)
    if (len(x) > 3 and x[3] is not None and axes is None) or steps is None or len(steps) != 1:
        return False
    axis = int(axes[0]) % len(value.shape) if axes else 0
    if (axes is not None and len(axes) != 1) or any(v is not None and len(v) != 1 for v in (starts, stops)):
        return False
    start = starts[0] if starts is not None else None
    stop = stops[0] if stops is not None else None
    size = value.shape[axis]
    to_end = (isinstance(stop, int) and stop >= END) or stop == size
    if start == 0 and to_end and steps == (1,):
        return t.same(value)
    length: Dim | None = None
    if steps == (1,) and start is not None and stop is not None:
        begin = add(size, start) if isinstance(start, int) and start < 0 else start
        end = size if to_end else add(size, stop) if isinstance(stop, int) and stop < 0 else stop
        if isinstance(size, int) and isinstance(begin, int) and isinstance(end, int):
            length = max(0, min(end, size) - max(begin, 0))
            start, stop = max(begin, 0), min(end, size)
        elif to_end or (isinstance(begin, int) and begin == 0 and not isinstance(end, int)):
            length = add(end, begin, -1)
    shape = replaced(value, axis, length) if length is not None else None
    if to_end and not isinstance(size, int):
        stop = None
    step = steps[0] if isinstance(steps[0], int) else None
    return t.result("slice", value, shape=shape, axis=axis, start=start, stop=stop, step=step)


def split(t: Translation, x: Inputs) -> bool:
    value = x[0]
    if value is None or value.shape is None:
        return False
    axis = int(t.attr("axis", 0)) % len(value.shape)
    count = len(t.node.outputs)
    sizes = t.vector(x[1]) if len(x) > 1 and x[1] is not None else None
    if sizes is None:
        if len(x) > 1 and x[1] is not None:
            return False
        whole = value.shape[axis]
        each = -(-whole // count) if isinstance(whole, int) else quotient(whole, count)
        sizes = (
            tuple(min(each, whole - i * each) for i in range(count))
            if isinstance(whole, int) and isinstance(each, int)
            else (each,) * count
        )
    start: int | None = 0
    for i, size in enumerate(sizes):
        stop = start + size if start is not None and isinstance(size, int) else None
        t.result("slice", value, shape=replaced(value, axis, size), output=i, axis=axis, start=start, stop=stop, step=1)
        start = stop
    return True


def gather(t: Translation, x: Inputs) -> bool:
    value, index = x
    if value is None or index is None or value.shape is None or index.shape is None:
        return False
    axis = int(t.attr("axis", 0)) % len(value.shape)
    held = index.scalar() if index.shape == () else None
    if isinstance(held, int):  # x[:, 3] is a slice without its axis
        size = value.shape[axis]
        held = held + size if held < 0 and isinstance(size, int) else held
        if held >= 0:
            piece = t.emit("slice", value, shape=replaced(value, axis, 1), axis=axis, start=held, stop=held + 1, step=1)
            return t.result("reshape", piece, shape=replaced(value, axis))
    return t.result("gather", value, index, shape=replaced(value, axis, *index.shape), axis=axis)


def concat(t: Translation, x: Inputs) -> bool:
    shapes = [v.shape for v in x if v is not None]
    if any(s is None for s in shapes):
        return False
    axis = int(t.attr("axis")) % len(shapes[0] or ())
    total: Dim = 0
    for shape in shapes:
        total = add(total, shape[axis])  # type: ignore[index]
    return (len(x) > 1 and t.result("concat", *x, shape=replaced(x[0], axis, total), axis=axis)) or (len(x) == 1 and t.same(x[0]))  # type: ignore[arg-type]


def range_(t: Translation, x: Inputs) -> bool:
    first, limit = t.vector(x[0]), t.vector(x[1])
    delta = x[2].scalar() if x[2] is not None else None
    start = first[0] if first is not None and len(first) == 1 else x[0].scalar() if x[0] is not None else None
    if start is None or not isinstance(delta, (int, float)):
        return False
    shape = None
    if limit is not None and len(limit) == 1 and delta == 1 and not isinstance(start, float):
        shape = (add(limit[0], start, -1),)
    return t.result("iota", shape=shape, start=start, step=delta)


def constant_of_shape(t: Translation, x: Inputs) -> bool:
    value = t.attr("value")
    filled = value.numpy().reshape(-1)[0].item() if value is not None else 0.0
    return t.result("full", shape=t.vector(x[0]), value=filled)


def trilu(t: Translation, x: Inputs) -> bool:
    diagonal = t.held(x[1]) if len(x) > 1 and x[1] is not None else [0]
    if x[0] is None or diagonal is None:
        return False
    return t.result("triangle", x[0], shape=x[0].shape, diagonal=int(diagonal[0]), upper=bool(t.attr("upper", 1)))


RULES: dict[str, Rule] = {
    "Slice": slice_,
    "Split": split,
    "Gather": gather,
    "Concat": concat,
    "Range": range_,
    "ConstantOfShape": constant_of_shape,
    "Trilu": trilu,
}
