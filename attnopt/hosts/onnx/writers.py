"""How each canonical operation is written in ONNX at the model's own opset.

reshape(x) to [batch, length, 12, 64]   ->   Reshape(x, [0, 0, 12, 64])        reduce_max   ->   axes as attribute below opset 18
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from attnopt.hosts.onnx.element_types import TYPES
from attnopt.ir.dims import Shape
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.builder import OnnxBuilder

NAMED = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow", "maximum": "Max", "minimum": "Min", "eq": "Equal",
    "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual", "and": "And", "or": "Or", "xor": "Xor", "not": "Not",
    "neg": "Neg", "abs": "Abs", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "reciprocal": "Reciprocal", "tanh": "Tanh",
    "sigmoid": "Sigmoid", "relu": "Relu", "erf": "Erf", "sin": "Sin", "cos": "Cos", "floor": "Floor", "round": "Round", "isnan": "IsNaN",
    "matmul": "MatMul",
}  # fmt: skip
Writer = Callable[["OnnxBuilder", list[Any], Shape, str, dict[str, Any]], Value]


def reshape(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("Reshape", [x[0], b.target(shape, x[0].shape)], shape, dtype)


def permute(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("Transpose", x, shape, dtype, perm=list(a["perm"]))


def linear(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    """ONNX has one for two dimensions alone. A stored matrix is turned once, when a runtime reads the file."""
    turned = b.node("Transpose", [x[1]], x[1].shape[::-1], x[1].dtype, perm=[1, 0])
    made = b.node("MatMul", [x[0], turned], shape, dtype)
    return made if len(x) == 2 or x[2] is None else b.node("Add", [made, x[2]], shape, dtype)


def expand(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    source = (1,) * (len(shape) - len(x[0].shape)) + x[0].shape
    return b.node("Expand", [x[0], b.joined(tuple(1 if s == d else d for s, d in zip(source, shape, strict=True)))], shape, dtype)


def cast(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("Cast", x, shape, dtype, to=int(TYPES[dtype]))


def reduction(op_type: str, axes_as_input_from: int) -> Writer:
    def write(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
        keep = int(a["keepdims"])
        if b.model.opset_imports.get("", 1) >= axes_as_input_from:
            return b.node(op_type, [x[0], b.vector(*a["axes"])], shape, dtype, keepdims=keep)
        return b.node(op_type, x, shape, dtype, axes=list(a["axes"]), keepdims=keep)

    return write


def softmax(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("Softmax", x, shape, dtype, axis=a["axis"])


def slice_(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    if a["start"] is None or a["step"] is None:
        raise NotImplementedError("a slice whose bounds are computed")
    stop = a["stop"] if a["stop"] is not None else 1 << 62
    return b.node("Slice", [x[0], b.size(a["start"]), b.size(stop), b.vector(a["axis"]), b.vector(a["step"])], shape, dtype)


def concat(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("Concat", x, shape, dtype, axis=a["axis"])


def gather(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("Gather", x, shape, dtype, axis=a["axis"])


def index(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    """GatherND indexes leading axes: those that are indexed go in front, and what stood before them back afterwards."""
    data, *chosen = x
    axes, before = tuple(a["axes"]), a["axes"][0]
    lead = shape[before : len(shape) - (len(data.shape) - axes[-1] - 1)]
    columns = []
    for value in chosen:
        wide = value if value.dtype == "int64" else cast(b, [value], value.shape, "int64", {})
        wide = wide if wide.shape == lead else expand(b, [wide], lead, "int64", {})
        columns.append(reshape(b, [wide], (*lead, 1), "int64", {}))
    stacked = b.node("Concat", columns, (*lead, len(columns)), "int64", axis=len(lead)) if len(columns) > 1 else columns[0]
    if before:
        front = (*axes, *(i for i in range(len(data.shape)) if i not in axes))
        data = permute(b, [data], tuple(data.shape[i] for i in front), dtype, {"perm": front})
    held = (*lead, *(d for i, d in enumerate(data.shape) if i >= len(axes)))
    made = b.node("GatherND", [data, stacked], held, dtype)
    if not before:
        return made
    count = len(lead)
    back = (*range(count, count + before), *range(count), *range(count + before, len(held)))
    return permute(b, [made], shape, dtype, {"perm": back})


def topk(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("TopK", [x[0], b.vector(a["count"])], shape, dtype, result=1)


def iota(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    """0, 1, 2, … in int64, then cast, stretched and moved: Range itself lacks most types."""
    (length,) = shape
    limit = b.constant(length, "int64") if isinstance(length, int) else b.number(b.size(length))
    made = b.node("Range", [b.constant(0, "int64"), limit, b.constant(1, "int64")], shape, "int64")
    dtype = dtype or "int64"
    if dtype != "int64":
        made = cast(b, [made], shape, dtype, {})
    if a.get("step", 1) != 1:
        made = b.node("Mul", [made, b.constant(a["step"], dtype)], shape, dtype)
    start = a.get("start", 0)
    if not start:
        return made
    first = b.constant(start, dtype) if isinstance(start, (int, float)) else cast(b, [b.size(start)], (1,), dtype, {})
    return b.node("Add", [made, first], shape, dtype)


def full(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("Expand", [b.constant(a["value"], dtype), b.joined(shape)], shape, dtype)


def triangle(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    if b.model.opset_imports.get("", 1) < 14:
        raise NotImplementedError("a triangle, which ONNX writes from opset 14 on")
    return b.node("Trilu", [x[0], b.constant(a["diagonal"], "int64")], shape, dtype, upper=int(a["upper"]))


def attention(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    if b.model.opset_imports.get("", 1) < 23:
        raise NotImplementedError("an attention, which ONNX writes from opset 23 on")
    return b.node(
        "Attention", x, shape, dtype, is_causal=int(a["causal"]), scale=float(a["scale"]), softcap=float(a.get("softcap") or 0.0)
    )


def rms_norm(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    """One node from opset 23 on; before, the nodes that runtimes know as one: x / sqrt(mean(x ** 2) + eps) * weight."""
    if b.model.opset_imports.get("", 1) >= 23:
        weight = x[1] if len(x) > 1 and x[1] is not None else b.constant(torch.ones(int(shape[-1])), dtype)  # type: ignore[arg-type]
        return b.node("RMSNormalization", [x[0], weight], shape, dtype, axis=-1, epsilon=float(a["eps"]))
    narrow, axis = (*shape[:-1], 1), len(shape) - 1
    squares = b.node("Pow", [x[0], b.constant(2.0, dtype)], shape, dtype)
    mean = b.emit("reduce_mean", squares, shape=narrow, dtype=dtype, axes=(axis,), keepdims=True)
    root = b.node("Sqrt", [b.node("Add", [mean, b.constant(float(a["eps"]), dtype)], narrow, dtype)], narrow, dtype)
    made = b.node("Div", [x[0], root], shape, dtype)
    return b.node("Mul", [made, x[1]], shape, dtype) if len(x) > 1 and x[1] is not None else made


def not_equal(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("Not", [b.node("Equal", x, shape, "bool")], shape, "bool")


def floor_division(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    """ONNX divides whole numbers towards zero: what its Mod leaves (of the divisor's sign) is taken off first."""
    if is_real(dtype):
        return b.node("Floor", [b.node("Div", x, shape, dtype)], shape, dtype)
    left = b.node("Mod", x, shape, dtype)
    return b.node("Div", [b.node("Sub", [x[0], left], shape, dtype), x[1]], shape, dtype)


def modulus(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    """Of the divisor's sign; for real numbers ONNX only has the remainder of the other sign."""
    if not is_real(dtype):
        return b.node("Mod", x, shape, dtype)
    whole = floor_division(b, x, shape, dtype, a)
    return b.node("Sub", [x[0], b.node("Mul", [whole, x[1]], shape, dtype)], shape, dtype)


def where(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    """onnxruntime has no Where for truth values: (c & x) | (~c & y)."""
    if dtype != "bool":
        return b.node("Where", x, shape, dtype)
    condition, yes, no = x
    other = b.node("And", [b.node("Not", [condition], condition.shape, "bool"), no], shape, "bool")
    return b.node("Or", [b.node("And", [condition, yes], shape, "bool"), other], shape, "bool")


def is_real(dtype: str) -> bool:
    return "float" in dtype


WRITERS: dict[str, Writer] = {
    "reshape": reshape,
    "permute": permute,
    "linear": linear,
    "expand": expand,
    "cast": cast,
    "reduce_sum": reduction("ReduceSum", 13),
    "reduce_mean": reduction("ReduceMean", 18),
    "reduce_max": reduction("ReduceMax", 18),
    "reduce_min": reduction("ReduceMin", 18),
    "softmax": softmax,
    "slice": slice_,
    "concat": concat,
    "gather": gather,
    "index": index,
    "topk": topk,
    "iota": iota,
    "full": full,
    "triangle": triangle,
    "attention": attention,
    "rms_norm": rms_norm,
    "ne": not_equal,
    "floordiv": floor_division,
    "mod": modulus,
    "where": where,
}
