"""sum, mean, amax, softmax, …  ->  reduce_*, softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnopt.hosts.fx.rules.layout import Arguments, Rule
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.fx.translate import Translation


def axes_of(value: Value, dim: Any) -> tuple[int, ...] | None:
    if value.shape is None:
        return None
    rank = len(value.shape)
    if dim is None or dim == []:
        return tuple(range(rank))
    listed = dim if isinstance(dim, (list, tuple)) else [dim]
    return tuple(int(axis) % rank for axis in listed) if rank else ()


def reduction(op: str) -> Rule:
    def rule(t: Translation, a: Arguments) -> bool:
        value = t.value(a["self"])
        axes = None if value is None else axes_of(value, a.get("dim"))
        if value is None or axes is None:
            return False
        if a.get("dtype") is not None:
            value = converted(t, value, a["dtype"])
        return t.result(op, value, axes=axes, keepdims=bool(a.get("keepdim", False)))

    return rule


def max_or_min(op: str, both: str) -> Rule:
    """max(x) reduces, max(x, dim) also gives indices, max(x, y) compares."""

    def rule(t: Translation, a: Arguments) -> bool:
        value = t.value(a["self"])
        if value is None:
            return False
        if a.get("other") is not None:
            return t.result(both, value, t.value(a["other"]))
        axes = axes_of(value, a.get("dim"))
        if axes is None:
            return False
        if a.get("dim") is None:
            return t.result(op, value, axes=axes, keepdims=False)
        made = t.symbols.shape(t.node.meta["val"][0])
        largest = t.emit(op, value, shape=made, axes=axes, keepdims=bool(a.get("keepdim", False)))
        where = t.fresh_result(t.node.meta["val"][1], ".indices", handle=False)
        t.graph.add("opaque", (value,), (where,), name=t.node.name, source=t.source, operator=str(t.node.target))
        return t.results([largest, where])

    return rule


def length(t: Translation, a: Arguments) -> bool:
    """The Euclidean norm along some axes: the root of the sum of squares."""
    value = t.value(a["self"])
    axes = None if value is None or a.get("dim") is None else axes_of(value, a["dim"])
    if value is None or axes is None or a.get("dtype") is not None or a.get("ord", a.get("p")) not in (None, 2, 2.0):
        return False
    squares = t.emit("mul", value, value, shape=value.shape or ())
    return t.result("sqrt", t.emit("reduce_sum", squares, shape=t.shape, axes=axes, keepdims=bool(a.get("keepdim", False))))


def logsumexp(t: Translation, a: Arguments) -> bool:
    """log(sum(exp(x))), without the shift that keeps it finite: a shift changes no meaning."""
    value = t.value(a["self"])
    axes = None if value is None else axes_of(value, a["dim"])
    if value is None or axes is None:
        return False
    exponents = t.emit("exp", value, shape=value.shape or ())
    total = t.emit("reduce_sum", exponents, shape=t.shape, axes=axes, keepdims=bool(a.get("keepdim", False)))
    return t.result("log", total)


def converted(t: Translation, value: Value, dtype: object) -> Value:
    name = str(dtype).removeprefix("torch.")
    if value.dtype == name:
        return value
    return t.emit("cast", value, shape=value.shape or (), dtype=name)


def softmax(t: Translation, a: Arguments) -> bool:
    value = t.value(a["self"])
    if value is None or value.shape is None:
        return False
    if a.get("dtype") is not None:
        value = converted(t, value, a["dtype"])
    elif a.get("half_to_float"):
        value = converted(t, value, "float32")
    return t.result("softmax", value, axis=a["dim"] % len(value.shape or (1,)))


def cumsum(t: Translation, a: Arguments) -> bool:
    value = t.value(a["self"])
    if value is None or not value.shape:
        return False
    value = converted(t, value, a["dtype"] if a.get("dtype") is not None else t.node.meta["val"].dtype)
    return t.result("cumsum", value, axis=a["dim"] % len(value.shape or (1,)))


RULES: dict[str, Rule] = {
    "aten.sum": reduction("reduce_sum"),
    "aten.logsumexp": logsumexp,
    "aten.mean": reduction("reduce_mean"),
    "aten.amax": reduction("reduce_max"),
    "aten.amin": reduction("reduce_min"),
    "aten.any": reduction("reduce_any"),
    "aten.max": max_or_min("reduce_max", "maximum"),
    "aten.min": max_or_min("reduce_min", "minimum"),
    "aten.softmax": softmax,
    "aten._softmax": softmax,
    "aten.cumsum": cumsum,
    "aten.linalg_vector_norm": length,
    "aten.norm": length,
}
