"""Operators that stand for several canonical ones.

    ReduceL2(x)     ->   sqrt(reduce_sum(x * x))
    Pad(x, 1, 2)    ->   concat(full, x, full)
    Softplus(x)     ->   max(x, 0) + log(1 + exp(-|x|))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.hosts.onnx.lengths import add, broadcast
from attnopt.hosts.onnx.rules.layout import Inputs, Rule
from attnopt.hosts.onnx.rules.reduction import reduced
from attnopt.ir.dims import Dim, divide, product
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation


def norm(kind: str) -> Rule:
    """ReduceL1, ReduceL2, ReduceSumSquare, ReduceLogSumExp."""
    inner = {"l1": "abs", "log_sum_exp": "exp"}.get(kind)
    outer = {"l2": "sqrt", "log_sum_exp": "log"}.get(kind)

    def rule(t: Translation, x: Inputs) -> bool:
        value, found = x[0], reduced(t, x)
        if value is None or value.shape is None or found is None:
            return False
        shape, attrs = found
        made = t.emit(inner, value, shape=value.shape) if inner else t.emit("mul", value, value, shape=value.shape)
        if outer is None:
            return t.result("reduce_sum", made, shape=shape, **attrs)
        return t.result(outer, t.emit("reduce_sum", made, shape=shape, **attrs), shape=shape)

    return rule


def softplus(t: Translation, x: Inputs) -> bool:
    value = x[0]
    if value is None or value.shape is None:
        return False

    def one(op: str, *inputs: Value) -> Value:
        return t.emit(op, *inputs, shape=value.shape or ())

    small = one("exp", one("neg", one("abs", value)))
    above = one("maximum", value, t.number(0.0, value.dtype))
    return t.result("add", above, one("log", one("add", small, t.number(1.0, value.dtype))), shape=value.shape)


def sign(t: Translation, x: Inputs) -> bool:
    value = x[0]
    if value is None or value.shape is None or not value.dtype:
        return False
    sides = []
    for op in ("gt", "lt"):
        holds = t.emit(op, value, t.number(0, value.dtype), shape=value.shape, dtype="bool")
        sides.append(t.emit("cast", holds, shape=value.shape, dtype=value.dtype))
    return t.result("sub", *sides, shape=value.shape)


def ceiling(t: Translation, x: Inputs) -> bool:
    value = x[0]
    if value is None or value.shape is None:
        return False
    return t.result("neg", t.emit("floor", t.emit("neg", value, shape=value.shape), shape=value.shape), shape=value.shape)


def swish(t: Translation, x: Inputs) -> bool:
    value, alpha = x[0], float(t.attr("alpha", 1.0))
    if value is None or value.shape is None:
        return False
    if alpha == 1.0:
        return t.result("silu", value, shape=value.shape)
    scaled = t.emit("mul", value, t.number(alpha, value.dtype), shape=value.shape)
    return t.result("mul", value, t.emit("sigmoid", scaled, shape=value.shape), shape=value.shape)


def log_softmax(t: Translation, x: Inputs) -> bool:
    value = x[0]
    if value is None or value.shape is None:
        return False
    axis = int(t.attr("axis", -1)) % len(value.shape)
    return t.result("log", t.emit("softmax", value, shape=value.shape, axis=axis), shape=value.shape)


def chained(op: str, *, mean: bool = False) -> Rule:
    """Max, Min, Sum and Mean of any number of tensors."""

    def rule(t: Translation, x: Inputs) -> bool:
        given = [v for v in x if v is not None and v.shape is not None]
        if len(given) != len(x) or not given:
            return False
        total = given[0]
        for i, other in enumerate(given[1:], start=2):
            shape = broadcast([total.shape or (), other.shape or ()], t.found_equal)
            if i == len(given) and not mean:
                return t.result(op, total, other, shape=shape)
            total = t.emit(op, total, other, shape=shape)
        if len(given) == 1:
            return t.same(total)
        return t.result("div", total, t.number(float(len(given)), total.dtype), shape=total.shape)

    return rule


def pad(t: Translation, x: Inputs) -> bool:
    """With one number on every side, by whole numbers of elements."""
    value, amounts = x[0], t.vector(x[1])
    filling = x[2].scalar() if len(x) > 2 and x[2] is not None else 0
    axes = t.held(x[3]) if len(x) > 3 and x[3] is not None else None
    if value is None or value.shape is None or amounts is None or filling is None or t.attr("mode", "constant") != "constant":
        return False
    over = [int(a) % len(value.shape) for a in axes] if axes is not None else list(range(len(value.shape)))
    if len(amounts) != 2 * len(over) or any(not isinstance(a, int) or a < 0 for a in amounts):
        return False
    sides = {axis: (amounts[i], amounts[i + len(over)]) for i, axis in enumerate(over)}
    wide = [axis for axis, (before, after) in sides.items() if before or after]
    for axis in wide:
        pieces = [margin(t, value, axis, before, filling) for before in sides[axis]]
        padded = [p for p in (pieces[0], value, pieces[1]) if p is not None]
        shape: tuple[Dim, ...] = value.shape or ()
        shape = (*shape[:axis], add(add(shape[axis], sides[axis][0]), sides[axis][1]), *shape[axis + 1 :])
        if axis == wide[-1]:
            return t.result("concat", *padded, shape=shape, axis=axis)
        value = t.emit("concat", *padded, shape=shape, axis=axis)
    return t.same(value)


def margin(t: Translation, value: Value, axis: int, size: Dim, filling: float) -> Value | None:
    shape = value.shape or ()
    return t.emit("full", shape=(*shape[:axis], size, *shape[axis + 1 :]), dtype=value.dtype, value=filling) if size else None


def depth_to_space(t: Translation, x: Inputs) -> bool:
    """Channels become the places of a block."""
    if x[0] is None or x[0].shape is None or len(x[0].shape) != 4:
        return False
    batch, channels, height, width = x[0].shape
    block = int(t.attr("blocksize"))
    kept = divide(channels, block * block)
    if kept is None:
        return False
    deep_first = t.attr("mode", "DCR") == "DCR"
    apart = (batch, block, block, kept, height, width) if deep_first else (batch, kept, block, block, height, width)
    perm = (0, 3, 4, 1, 5, 2) if deep_first else (0, 1, 4, 2, 5, 3)
    split = t.emit("reshape", x[0], shape=apart)
    turned = t.emit("permute", split, shape=tuple(apart[i] for i in perm), perm=perm)
    return t.result("reshape", turned, shape=(batch, kept, product([height, block]), product([width, block])))


def space_to_depth(t: Translation, x: Inputs) -> bool:
    """The places of a block become channels."""
    if x[0] is None or x[0].shape is None or len(x[0].shape) != 4:
        return False
    batch, channels, *lengths = x[0].shape
    block = int(t.attr("blocksize"))
    rows, columns = (divide(length, block) for length in lengths)
    if rows is None or columns is None:
        return False
    apart = (batch, channels, rows, block, columns, block)
    perm = (0, 3, 5, 1, 2, 4)
    split = t.emit("reshape", x[0], shape=apart)
    turned = t.emit("permute", split, shape=tuple(apart[i] for i in perm), perm=perm)
    return t.result("reshape", turned, shape=(batch, product([channels, block * block]), rows, columns))


RULES: dict[str, Rule] = {
    "ReduceL1": norm("l1"),
    "ReduceL2": norm("l2"),
    "ReduceSumSquare": norm("square"),
    "ReduceLogSumExp": norm("log_sum_exp"),
    "Softplus": softplus,
    "Sign": sign,
    "Ceil": ceiling,
    "Swish": swish,
    "LogSoftmax": log_softmax,
    "Max": chained("maximum"),
    "Min": chained("minimum"),
    "Sum": chained("add"),
    "Mean": chained("add", mean=True),
    "Pad": pad,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
}
