"""slice, select, chunk, cat, embedding, arange, full, tril, …  ->  slice, concat, gather, iota, full, triangle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnopt.hosts.fx.rules.layout import Arguments, Rule
from attnopt.ir.dims import Dim, symbol
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.fx.translate import Translation

END = 1 << 62  # aten writes "to the end" as the largest int64


def replaced(value: Value, axis: int, *sizes: Dim) -> tuple[Dim, ...]:
    """The shape with one axis replaced by these sizes (none removes it)."""
    shape = value.shape or ()
    return (*shape[:axis], *sizes, *shape[axis + 1 :])


def number(x: Any) -> int | None:
    return x if isinstance(x, int) else None


def bound(t: Translation, x: Any) -> Dim | None:
    """A bound of a slice: a number, or a size of the graph."""
    if isinstance(x, int):
        return x
    held = getattr(x, "meta", {}).get("val")
    return t.symbols.dim(held) if isinstance(held, torch.SymInt) else None


def slice_(t: Translation, a: Arguments) -> bool:
    value = t.value(a["self"])
    if value is None or value.shape is None:
        return False
    axis = a["dim"] % len(value.shape)
    start, stop = a["start"] or 0, a["end"]
    if stop is None or (isinstance(stop, int) and stop >= END):
        stop = value.shape[axis] if isinstance(value.shape[axis], int) else None
        whole = start == 0 and a["step"] == 1
    else:
        whole = start == 0 and a["step"] == 1 and value.shape == t.shape
    if whole:
        return t.same(value)
    return t.result("slice", value, axis=axis, start=bound(t, start), stop=bound(t, stop), step=number(a["step"]))


def narrow(t: Translation, a: Arguments) -> bool:
    value = t.value(a["self"])
    if value is None or value.shape is None:
        return False
    start, length = bound(t, a["start"]), number(a["length"])
    stop = start + length if isinstance(start, int) and length is not None else None
    return t.result("slice", value, axis=a["dim"] % len(value.shape), start=start, stop=stop, step=1)


def piece(t: Translation, value: Value, axis: int, start: int | None, size: Dim) -> Value:
    stop = start + size if start is not None and isinstance(size, int) else None
    return t.emit("slice", value, shape=replaced(value, axis, size), axis=axis, start=start, stop=stop, step=1)


def diff(t: Translation, a: Arguments) -> bool:
    """What each row is more than the one before it, of the rows with what is put before and behind them."""
    rows = [t.value(a[name]) for name in ("prepend", "self", "append") if a.get(name) is not None]
    if a["n"] != 1 or any(v is None or v.shape is None or v.dtype == "bool" for v in rows):
        return False
    axis, parts = a["dim"] % len(t.shape), [v for v in rows if v is not None]
    fewer = t.shape[axis]
    count = fewer + 1 if isinstance(fewer, int) else symbol(f"{fewer} + 1")
    whole = parts[0] if len(parts) == 1 else t.emit("concat", *parts, shape=replaced(parts[0], axis, count), axis=axis)
    ahead = t.emit("slice", whole, shape=t.shape, axis=axis, start=1, stop=None, step=1)
    behind = t.emit("slice", whole, shape=t.shape, axis=axis, start=0, stop=-1, step=1)
    return t.result("sub", ahead, behind)


def select(t: Translation, a: Arguments) -> bool:
    value = t.value(a["self"])
    if value is None or value.shape is None:
        return False
    axis, index = a["dim"] % len(value.shape), number(a["index"])
    size = value.shape[axis]
    if index is not None and index < 0 and not isinstance(size, int):
        stop = index + 1 if index < -1 else None
        one = t.emit("slice", value, shape=replaced(value, axis, 1), axis=axis, start=index, stop=stop, step=1)
        return t.result("reshape", one)
    if index is not None and index < 0:
        index += size  # type: ignore[operator]
    return t.result("reshape", piece(t, value, axis, index, 1))


def pieces(t: Translation, a: Arguments) -> bool:
    """chunk and split: neighbours along one axis, their sizes known from what the operator makes."""
    value = t.value(a["self"])
    if value is None or value.shape is None:
        return False
    axis = a["dim"] % len(value.shape)
    start: int | None = 0
    made = []
    for part in t.node.meta["val"]:
        size = t.symbols.shape(part)[axis]
        made.append(piece(t, value, axis, start, size))
        start = start + size if start is not None and isinstance(size, int) else None
    return t.results(made)


def unbind(t: Translation, a: Arguments) -> bool:
    value = t.value(a["self"])
    if value is None or value.shape is None:
        return False
    axis = a["dim"] % len(value.shape)
    parts = [piece(t, value, axis, i, 1) for i in range(len(t.node.meta["val"]))]
    return t.results([t.emit("reshape", part, shape=replaced(value, axis)) for part in parts])


def concat(t: Translation, a: Arguments) -> bool:
    """torch leaves out empty vectors beside tensors of another rank: the first keys of a cache are joined to one."""
    every = [t.value(x) for x in a["tensors"]]
    values = [v for v in every if v is None or v.shape != (0,) or len(t.shape) == 1]
    if len(values) == 1 and len(every) > 1:
        return t.same(values[0])
    return t.result("concat", *values, axis=a["dim"] % len(t.shape))


def stack(t: Translation, a: Arguments) -> bool:
    values = [t.value(x) for x in a["tensors"]]
    axis = a["dim"] % len(t.shape)
    apart = [
        t.emit("reshape", v, shape=(*v.shape[:axis], 1, *v.shape[axis:])) for v in values if v is not None and v.shape is not None
    ]
    return len(apart) == len(values) and t.result("concat", *apart, axis=axis)


def gather(t: Translation, a: Arguments) -> bool:
    value, index = t.value(a["self"]), t.value(a["index"])
    return value is not None and value.shape is not None and t.result("gather", value, index, axis=a["dim"] % len(value.shape))


def embedding(t: Translation, a: Arguments) -> bool:
    return t.result("gather", t.value(a["weight"]), t.value(a["indices"]), axis=0, unsigned=True)


def index(t: Translation, a: Arguments) -> bool:
    """x[:, i]: one index tensor is a gather along its axis; x[i, j]: several must stand at neighbouring axes."""
    given = [(axis, t.value(x)) for axis, x in enumerate(a["indices"]) if x is not None]
    if any(value is None or value.dtype not in ("int64", "int32") for _, value in given) or not given:
        return False
    axes = tuple(axis for axis, _ in given)
    if len(given) == 1:
        return t.result("gather", t.value(a["self"]), given[0][1], axis=axes[0])
    together = axes == tuple(range(axes[0], axes[-1] + 1))
    return together and t.result("index", t.value(a["self"]), *(value for _, value in given), axes=axes)


def gather_rows(t: Translation, a: Arguments) -> bool:
    """gather whose index is one number per row, repeated over the columns: whole rows of a table are read."""
    value, chosen = t.value(a["self"]), t.value(a["index"])
    if value is None or chosen is None or value.shape is None or chosen.producer is None or chosen.producer.op != "expand":
        return False
    axis, rank = a["dim"] % len(value.shape), len(value.shape)
    if value.producer is not None and value.producer.op == "expand":
        value = value.producer.inputs[0]
    core = chosen.producer.inputs[0]
    if value is None or core is None or value.shape is None or core.shape is None or len(core.shape) != rank:
        return False
    sizes = (1,) * (rank - len(value.shape)) + value.shape
    rows = all(size == 1 for size in sizes[:axis]) and all(size == 1 for size in core.shape[axis + 1 :])
    if not rows or sizes[axis + 1 :] != t.shape[axis + 1 :] or core.shape[: axis + 1] != t.shape[: axis + 1]:
        return False
    table = value if len(value.shape) == rank - axis else t.emit("reshape", value, shape=sizes[axis:])
    return t.result("gather", table, t.emit("reshape", core, shape=core.shape[: axis + 1]), axis=0)


def scatter(t: Translation, a: Arguments) -> bool:
    """index_copy: whole rows of a cache replaced."""
    value, indices = t.value(a["self"]), t.value(a["index"])
    if value is None or value.shape is None or indices is None or len(indices.shape or ()) != 1:
        return False
    return t.result("scatter", value, indices, t.value(a["source"]), axis=a["dim"] % len(value.shape))


def index_put(t: Translation, a: Arguments) -> bool:
    """x[:, :, i] = rows: one index tensor, nothing added up."""
    given = [(axis, t.value(x)) for axis, x in enumerate(a["indices"]) if x is not None]
    value, new = t.value(a["self"]), t.value(a["values"])
    if len(given) != 1 or a.get("accumulate") or value is None or value.shape is None or new is None or new.shape is None:
        return False
    axis, indices = given[0]
    if indices is None or indices.dtype not in ("int64", "int32") or len(indices.shape or ()) != 1:
        return False
    wanted = replaced(value, axis, indices.shape[0])  # type: ignore[index]
    return new.shape == wanted and t.result("scatter", value, indices, new, axis=axis)


def copy(t: Translation, a: Arguments) -> bool:
    """x.copy_(y) as a value: y in the shape and type of x."""
    new = t.value(a["src"])
    if new is None or str(t.node.meta["val"].dtype) != f"torch.{new.dtype}":
        return False
    return t.same(new) if new.shape == t.shape else t.result("expand", new)


def arange(t: Translation, a: Arguments) -> bool:
    start, step = a.get("start", 0) or 0, a.get("step", 1) or 1
    first = start if isinstance(start, float) else bound(t, start)
    return first is not None and isinstance(step, (int, float)) and t.result("iota", start=first, step=step)


def full(value: str | float) -> Rule:
    def rule(t: Translation, a: Arguments) -> bool:
        filled = a.get(value) if isinstance(value, str) else value
        return isinstance(filled, (bool, int, float)) and t.result("full", value=filled)

    return rule


def triangle(upper: bool) -> Rule:
    return lambda t, a: (
        isinstance(a["diagonal"], int) and t.result("triangle", t.value(a["self"]), diagonal=a["diagonal"], upper=upper)
    )


RULES: dict[str, Rule] = {
    "aten.slice": slice_,
    "aten.narrow": narrow,
    "aten.diff": diff,
    "aten.select": select,
    **{f"aten.{name}": pieces for name in ("chunk", "split", "split_with_sizes", "tensor_split")},
    "aten.unbind": unbind,
    "aten.cat": concat,
    "aten.concat": concat,
    "aten.stack": stack,
    "aten.index_select": gather,
    "aten.embedding": embedding,
    "aten.index": index,
    "aten.gather": gather_rows,
    "aten.index_copy": scatter,
    "aten.index_put": index_put,
    "aten.copy": copy,
    "aten.arange": arange,
    **{f"aten.{name}": full("fill_value") for name in ("full", "full_like", "new_full")},
    "aten.scalar_tensor": full("s"),
    "aten.fill": full("value"),
    **{f"aten.{name}": full(0) for name in ("zeros", "zeros_like", "new_zeros")},
    **{f"aten.{name}": full(1) for name in ("ones", "ones_like", "new_ones")},
    "aten.tril": triangle(upper=False),
    "aten.triu": triangle(upper=True),
}
