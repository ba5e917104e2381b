"""add, mul, where, masked_fill, …  ->  the canonical element-wise operations; numbers become constants of one element."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnopt.hosts.fx.rules.layout import Arguments, Rule

if TYPE_CHECKING:
    from attnopt.hosts.fx.translate import Translation

COMPARE = {"eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge"}
LOGIC = {
    **dict.fromkeys(("__and__", "bitwise_and", "logical_and"), "and"),
    **dict.fromkeys(("__or__", "bitwise_or", "logical_or"), "or"),
    **dict.fromkeys(("__xor__", "bitwise_xor", "logical_xor"), "xor"),
}
UNARY = (
    "neg",
    "abs",
    "exp",
    "log",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "tanh",
    "sigmoid",
    "relu",
    "silu",
    "erf",
    "sin",
    "cos",
    "floor",
    "isnan",
    "isinf",
)


def binary(op: str) -> Rule:
    def rule(t: Translation, a: Arguments) -> bool:
        return t.result(op, t.value(a["self"]), t.value(a["other"]))

    return rule


def sum_or_difference(op: str) -> Rule:
    """a + alpha * b."""

    def rule(t: Translation, a: Arguments) -> bool:
        left, right = t.value(a["self"]), t.value(a["other"])
        if left is None or right is None:
            return False
        if a.get("alpha", 1) != 1:
            right = t.emit("mul", right, t.value(a["alpha"]), shape=right.shape or ())
        if adds_zero(right.scalar()) and left.shape == t.shape and left.dtype == t.fresh_result().dtype:
            return t.same(left)  # position + 0, where a cache would add its length
        return t.result(op, left, right)

    return rule


def adds_zero(number: object) -> bool:
    return number is not None and number == 0


def reversed_difference(t: Translation, a: Arguments) -> bool:
    return a.get("alpha", 1) == 1 and t.result("sub", t.value(a["other"]), t.value(a["self"]))


def division(t: Translation, a: Arguments) -> bool:
    mode = a.get("rounding_mode")
    if mode not in (None, "floor"):
        return False
    return t.result("floordiv" if mode else "div", t.value(a["self"]), t.value(a["other"]))


def power(t: Translation, a: Arguments) -> bool:
    return t.result("pow", t.value(a["self"]), t.value(a["exponent"]))


def logic(op: str) -> Rule:
    """Bit-wise operators are logic on bool tensors only."""

    def rule(t: Translation, a: Arguments) -> bool:
        inputs = [t.value(a["self"]), t.value(a["other"])]
        return all(i is not None and i.dtype == "bool" for i in inputs) and t.result(op, *inputs)

    return rule


def negation(t: Translation, a: Arguments) -> bool:
    value = t.value(a["self"])
    return value is not None and value.dtype == "bool" and t.result("not", value)


def unary(op: str) -> Rule:
    return lambda t, a: t.result(op, t.value(a["self"]))


def rounding(t: Translation, a: Arguments) -> bool:
    """To whole numbers, halves to even ones; to decimals is nothing canonical."""
    return not a.get("decimals") and t.result("round", t.value(a["self"]))


def gelu(t: Translation, a: Arguments) -> bool:
    return t.result("gelu", t.value(a["self"]), approximate=a.get("approximate", "none"))


def clamp(t: Translation, a: Arguments) -> bool:
    low, high = t.value(a.get("min")), t.value(a.get("max"))
    value = t.value(a["self"])
    if low is not None and high is not None and value is not None:
        return t.result("minimum", t.emit("maximum", value, low, shape=t.shape), high)
    return t.result("maximum", value, low) if low is not None else t.result("minimum", value, high)


def nan_to_num(t: Translation, a: Arguments) -> bool:
    """NaN becomes a number, infinities the largest finite ones: min(max(where(isnan(x), 0, x), lowest), highest)."""
    value = t.value(a["self"])
    if value is None or a.get("posinf") is not None or a.get("neginf") is not None or "float" not in value.dtype:
        return False
    limits = torch.finfo(getattr(torch, value.dtype))
    unknown = t.emit("isnan", value, shape=t.shape, dtype="bool")
    known = t.emit("where", unknown, t.value(a.get("nan") or 0.0), value, shape=t.shape)
    return t.result("minimum", t.emit("maximum", known, t.value(limits.min), shape=t.shape), t.value(limits.max))


def where(t: Translation, a: Arguments) -> bool:
    if a.get("self") is None or a.get("other") is None:  # where(condition) alone lists indices
        return False
    return t.result("where", t.value(a["condition"]), t.value(a["self"]), t.value(a["other"]))


def masked_fill(t: Translation, a: Arguments) -> bool:
    """Hidden where the mask is true: where(mask, value, x)."""
    return t.result("where", t.value(a["mask"]), t.value(a["value"]), t.value(a["self"]))


RULES: dict[str, Rule] = {
    "aten.add": sum_or_difference("add"),
    "aten.sub": sum_or_difference("sub"),
    "aten.rsub": reversed_difference,
    "aten.mul": binary("mul"),
    "aten.div": division,
    "aten.true_divide": binary("div"),
    "aten.floor_divide": binary("floordiv"),
    "aten.remainder": binary("mod"),
    "aten.pow": power,
    "aten.maximum": binary("maximum"),
    "aten.minimum": binary("minimum"),
    **{f"aten.{name}": binary(op) for name, op in COMPARE.items()},
    **{f"aten.{name}": logic(op) for name, op in LOGIC.items()},
    "aten.logical_not": negation,
    "aten.bitwise_not": negation,
    **{f"aten.{name}": unary(name) for name in UNARY},
    "aten.round": rounding,
    "aten.gelu": gelu,
    "aten.clamp": clamp,
    "aten.clamp_min": clamp,
    "aten.clamp_max": clamp,
    "aten.nan_to_num": nan_to_num,
    "aten.where": where,
    "aten.masked_fill": masked_fill,
}
