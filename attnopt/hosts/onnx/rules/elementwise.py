"""Add, Mul, Where, Cast, …  ->  the canonical element-wise operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from attnopt.hosts.onnx.element_types import dtype_name
from attnopt.hosts.onnx.rules.layout import Inputs, Rule

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation

BINARY = {"Add": "add", "Sub": "sub", "Mul": "mul", "Pow": "pow"}
COMPARE = {
    "Equal": "eq", "Less": "lt", "LessOrEqual": "le", "Greater": "gt", "GreaterOrEqual": "ge", "And": "and", "Or": "or", "Xor": "xor",
}  # fmt: skip
UNARY = {
    "Neg": "neg", "Abs": "abs", "Exp": "exp", "Log": "log", "Sqrt": "sqrt", "Reciprocal": "reciprocal", "Tanh": "tanh",
    "Sigmoid": "sigmoid", "Relu": "relu", "Erf": "erf", "Sin": "sin", "Cos": "cos", "Floor": "floor", "Round": "round",
}  # fmt: skip
FLOATS = ("float32", "float64", "float16", "bfloat16")


def binary(op: str, dtype: str = "") -> Rule:
    return lambda t, x: t.result(op, *x, shape=t.broadcast(*x), dtype=dtype)


def division(t: Translation, x: Inputs) -> bool:
    """Of floats. Integers divide towards zero, which no canonical operation does."""
    return x[0] is not None and x[0].dtype in FLOATS and t.result("div", *x, shape=t.broadcast(*x))


def modulo(t: Translation, x: Inputs) -> bool:
    return not t.attr("fmod", 0) and t.result("mod", *x, shape=t.broadcast(*x))


def unary(op: str, dtype: str = "") -> Rule:
    return lambda t, x: x[0] is not None and t.result(op, x[0], shape=x[0].shape, dtype=dtype)


def infinite(t: Translation, x: Inputs) -> bool:
    both = t.attr("detect_negative", 1) and t.attr("detect_positive", 1)
    return bool(both) and x[0] is not None and t.result("isinf", x[0], shape=x[0].shape, dtype="bool")


def cast(t: Translation, x: Inputs) -> bool:
    dtype = dtype_name(ir.DataType(t.attr("to")))
    if x[0] is None or not dtype:
        return False
    return t.same(x[0]) if x[0].dtype == dtype else t.result("cast", x[0], shape=x[0].shape, dtype=dtype) and named(t, dtype)


def cast_like(t: Translation, x: Inputs) -> bool:
    if x[0] is None or x[1] is None or not x[1].dtype:
        return False
    return (
        t.same(x[0])
        if x[0].dtype == x[1].dtype
        else t.result("cast", x[0], shape=x[0].shape, dtype=x[1].dtype) and named(t, x[1].dtype)
    )


def named(t: Translation, dtype: str) -> bool:
    """Write the type down as an attribute of the cast as well."""
    t.graph.nodes[-1].attrs["dtype"] = dtype
    return True


def where(t: Translation, x: Inputs) -> bool:
    dtype = next((v.dtype for v in x[1:] if v is not None and v.dtype), "")
    return t.result("where", *x, shape=t.broadcast(*x), dtype=dtype)


def clip(t: Translation, x: Inputs) -> bool:
    low, high = (x[i] if len(x) > i else None for i in (1, 2))
    if x[0] is None or x[0].shape is None:
        return False
    if low is not None and high is not None:
        return t.result("minimum", t.emit("maximum", x[0], low, shape=x[0].shape), high, shape=x[0].shape)
    if low is None and high is None:
        return t.same(x[0])
    return t.result("minimum" if low is None else "maximum", x[0], low or high, shape=x[0].shape)


def gelu(t: Translation, x: Inputs) -> bool:
    return x[0] is not None and t.result("gelu", x[0], shape=x[0].shape, approximate=str(t.attr("approximate", "none")))


RULES: dict[str, Rule] = {
    **{name: binary(op) for name, op in BINARY.items()},
    **{name: binary(op, "bool") for name, op in COMPARE.items()},
    **{name: unary(op) for name, op in UNARY.items()},
    "Div": division,
    "Mod": modulo,
    "Not": unary("not", "bool"),
    "IsNaN": unary("isnan", "bool"),
    "IsInf": infinite,
    "Cast": cast,
    "CastLike": cast_like,
    "Where": where,
    "Clip": clip,
    "Gelu": gelu,
}
