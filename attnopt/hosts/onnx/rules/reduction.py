"""ReduceSum, Softmax, CumSum, …  ->  reduce_*, softmax, cumsum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnopt.hosts.onnx.rules.layout import Inputs, Rule
from attnopt.ir.dims import Dim, Shape

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation


def reduced(t: Translation, x: Inputs) -> tuple[Shape, dict[str, Any]] | None:
    """The shape of a reduction and what it runs over; None where that is not known."""
    value = x[0]
    if value is None or value.shape is None:
        return None
    given = t.held(x[1]) if len(x) > 1 and x[1] is not None else t.attr("axes")
    if len(x) > 1 and x[1] is not None and given is None:
        return None
    rank = len(value.shape)
    if not given and t.attr("noop_with_empty_axes", 0):
        axes: tuple[int, ...] = ()
    else:
        axes = tuple(sorted(a % rank for a in given)) if given else tuple(range(rank))
    keep = bool(t.attr("keepdims", 1))
    shape: list[Dim] = [1 if i in axes else d for i, d in enumerate(value.shape) if keep or i not in axes]
    return tuple(shape), {"axes": axes, "keepdims": keep}


def reduction(op: str) -> Rule:
    def rule(t: Translation, x: Inputs) -> bool:
        found = reduced(t, x)
        if found is None:
            return False
        shape, attrs = found
        return t.result(op, x[0], shape=shape, **attrs) if attrs["axes"] else t.same(x[0])

    return rule


def length(t: Translation, x: Inputs) -> bool:
    """ReduceL2: the root of the sum of squares."""
    value = x[0]
    given = t.held(x[1]) if len(x) > 1 and x[1] is not None else t.attr("axes")
    if value is None or value.shape is None or not given:
        return False
    axes = tuple(sorted(a % len(value.shape) for a in given))
    keep = bool(t.attr("keepdims", 1))
    shape: tuple[Dim, ...] = tuple(1 if i in axes else d for i, d in enumerate(value.shape) if keep or i not in axes)
    squares = t.emit("mul", value, value, shape=value.shape)
    return t.result("sqrt", t.emit("reduce_sum", squares, shape=shape, axes=axes, keepdims=keep), shape=shape)


def softmax(t: Translation, x: Inputs) -> bool:
    value = x[0]
    if value is None or value.shape is None:
        return False
    return t.result("softmax", value, shape=value.shape, axis=int(t.attr("axis", -1)) % len(value.shape))


def cumsum(t: Translation, x: Inputs) -> bool:
    axis = t.held(x[1])
    plain = not t.attr("exclusive", 0) and not t.attr("reverse", 0)
    if x[0] is None or x[0].shape is None or axis is None or not plain:
        return False
    return t.result("cumsum", x[0], shape=x[0].shape, axis=int(axis[0]) % len(x[0].shape))


RULES: dict[str, Rule] = {
    "ReduceSum": reduction("reduce_sum"),
    "ReduceMean": reduction("reduce_mean"),
    "ReduceMax": reduction("reduce_max"),
    "ReduceMin": reduction("reduce_min"),
    "ReduceL2": length,
    "Softmax": softmax,
    "CumSum": cumsum,
}
