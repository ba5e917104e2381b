"""Slice, Split, Gather, Concat, Range, Trilu, …  ->  slice, gather, concat, iota, full, triangle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.hosts.onnx.element_types import dtype_name
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


Bound = Dim | None


def slice_(t: Translation, x: Inputs) -> bool:
    """Axis by axis; bounds that are neither numbers nor sizes stay unknown, and the declared shape holds."""
    value = x[0]
    if value is None or value.shape is None:
        return False
    starts, stops = t.vector(x[1]), t.vector(x[2])
    axes = t.held(x[3]) if len(x) > 3 and x[3] is not None else list(range(len(starts or (0,))))
    if axes is None or not axes:
        return False
    steps = t.vector(x[4]) if len(x) > 4 and x[4] is not None else (1,) * len(axes)
    given = [v for v in (starts, stops, steps) if v is not None]
    if steps is None or any(len(v) != len(axes) for v in given) or (len(axes) > 1 and len(given) < 3):
        return False
    last: tuple[Value, int, Bound, Bound, Bound, Dim | None] | None = None
    for i, axis in enumerate(int(a) % len(value.shape) for a in axes):
        if last is not None:
            value = one_axis(t, *last)
            if value is None:
                return False
        assert value.shape is not None
        size = value.shape[axis]
        start, stop, length = bounds(size, starts[i] if starts else None, stops[i] if stops else None, steps[i])
        if start == 0 and length is not None and length == size and steps[i] == 1:
            continue
        last = (value, axis, start, stop, steps[i] if isinstance(steps[i], int) else None, length)
    if last is None:
        return t.same(value)
    source, axis, start, stop, step, length = last
    shape = replaced(source, axis, length) if length is not None else None
    return t.result("slice", source, shape=shape, axis=axis, start=start, stop=stop, step=step)


def one_axis(t: Translation, value: Value, axis: int, start: Bound, stop: Bound, step: Bound, length: Dim | None) -> Value | None:
    if length is None:
        return None
    return t.emit("slice", value, shape=replaced(value, axis, length), axis=axis, start=start, stop=stop, step=step)


def bounds(size: Dim, start: Bound, stop: Bound, step: Dim) -> tuple[Bound, Bound, Dim | None]:
    """Start and stop with numbers inside of the axis, and the length that is left, where it is known."""
    to_end = (isinstance(stop, int) and stop >= END) or stop == size
    length: Dim | None = None
    if isinstance(step, int) and step > 0 and start is not None and stop is not None:
        begin = add(size, start) if isinstance(start, int) and start < 0 else start
        end = size if to_end else add(size, stop) if isinstance(stop, int) and stop < 0 else stop
        if isinstance(size, int) and isinstance(begin, int) and isinstance(end, int):
            start, stop = max(begin, 0), min(end, size)
            length = max(0, -(-(stop - start) // step))
        elif step == 1 and (to_end or (isinstance(begin, int) and begin == 0 and not isinstance(end, int))):
            length = add(end, begin, -1)
    if to_end and not isinstance(size, int):
        stop = None
    return start, stop, length


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


def gather_rows(t: Translation, x: Inputs) -> bool:
    """GatherElements whose index is one number per row, repeated over the columns: whole rows of a table are read."""
    value, chosen = x
    if value is None or chosen is None or value.shape is None or chosen.producer is None or chosen.producer.op != "expand":
        return False
    axis, rank = int(t.attr("axis", 0)) % len(value.shape), len(value.shape)
    if value.producer is not None and value.producer.op == "expand":
        value = value.producer.inputs[0]
    core, made = chosen.producer.inputs[0], chosen.shape
    if value is None or core is None or value.shape is None or core.shape is None or made is None or len(core.shape) != rank:
        return False
    sizes = (1,) * (rank - len(value.shape)) + value.shape
    rows = all(size == 1 for size in sizes[:axis]) and all(size == 1 for size in core.shape[axis + 1 :])
    if not rows or sizes[axis + 1 :] != made[axis + 1 :] or core.shape[: axis + 1] != made[: axis + 1]:
        return False
    table = value if len(value.shape) == rank - axis else t.emit("reshape", value, shape=sizes[axis:])
    return t.result("gather", table, t.emit("reshape", core, shape=core.shape[: axis + 1]), shape=made, axis=0)


def scatter_nd(t: Translation, x: Inputs) -> bool:
    """ScatterND with one index per row: whole rows along the first axis replaced."""
    value, indices, new = x
    shapes = [v.shape if v is not None else None for v in x]
    if value is None or indices is None or any(s is None for s in shapes) or t.attr("reduction", "none") not in ("none", b"none"):
        return False
    if len(shapes[1] or ()) != 2 or shapes[1][-1] != 1 or len(shapes[2] or ()) != len(shapes[0] or ()):  # type: ignore[index]
        return False
    chosen = t.emit("reshape", indices, shape=shapes[1][:1])  # type: ignore[index]
    return t.result("scatter", value, chosen, new, shape=value.shape, axis=0)


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
    return t.result("full", shape=t.vector(x[0]), dtype=dtype_name(value.dtype) if value is not None else "float32", value=filled)


def trilu(t: Translation, x: Inputs) -> bool:
    diagonal = t.held(x[1]) if len(x) > 1 and x[1] is not None else [0]
    if x[0] is None or diagonal is None:
        return False
    return t.result("triangle", x[0], shape=x[0].shape, diagonal=int(diagonal[0]), upper=bool(t.attr("upper", 1)))


RULES: dict[str, Rule] = {
    "Slice": slice_,
    "Split": split,
    "Gather": gather,
    "ScatterND": scatter_nd,
    "Concat": concat,
    "Range": range_,
    "ConstantOfShape": constant_of_shape,
    "Trilu": trilu,
}
