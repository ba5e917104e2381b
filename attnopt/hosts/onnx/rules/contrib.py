"""What onnxruntime's optimisers fuse around attention  ->  the parts again.

SkipLayerNormalization(x, skip, g, b)   ->   layer_norm(add(x, skip), g, b)
FusedMatMul(a, b; transB, alpha)        ->   mul(matmul(a, permute(b)), alpha)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attnopt.hosts.onnx.lengths import broadcast
from attnopt.hosts.onnx.rules.heads import is_read
from attnopt.hosts.onnx.rules.layout import Inputs, Rule
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation


def given(x: Inputs, count: int) -> Sequence[Value | None]:
    return (*x, *(None,) * count)[:count]


def skip_norm(op: str) -> Rule:
    """The norm of a sum; the sum itself is the fourth output."""

    def rule(t: Translation, x: Inputs) -> bool:
        value, skip, weight, *rest = given(x, 5)
        shift, bias = rest if op == "layer_norm" else (None, rest[0])
        if value is None or value.shape is None or skip is None or skip.shape is None or is_read(t, 1) or is_read(t, 2):
            return False
        shape = value.shape
        summed = [value, skip, *([bias] if bias is not None else [])]
        total = summed[0]
        for i, other in enumerate(summed[1:], start=2):
            if i == len(summed) and is_read(t, 3):
                t.result("add", total, other, shape=shape, output=3)
                total = t.values[t.node.outputs[3]]
            else:
                total = t.emit("add", total, other, shape=shape)
        weights = (weight, shift) if op == "layer_norm" else (weight,)
        return t.result(op, total, *weights, shape=shape, eps=float(t.attr("epsilon", 1e-12 if op == "layer_norm" else 1e-6)))

    return rule


def embedding_norm(t: Translation, x: Inputs) -> bool:
    """EmbedLayerNormalization: rows of up to three tables, their sum normalised, and how long each row of ids is."""
    ids, segments, words, places, kinds, weight, shift, mask, positions = given(x, 9)
    if ids is None or ids.shape is None or words is None or words.shape is None or places is None or places.shape is None:
        return False
    width = words.shape[1]
    shape = (*ids.shape, width)
    if positions is None:
        positions = t.emit("iota", shape=(ids.shape[1],), dtype="int64", start=0, step=1)
    looked = [(words, ids), (places, positions), *([(kinds, segments)] if kinds is not None and segments is not None else [])]
    rows = [t.emit("gather", table, at, shape=(*(at.shape or ()), width), dtype=table.dtype, axis=0) for table, at in looked]
    total = rows[0]
    for i, row in enumerate(rows[1:], start=2):
        if i == len(rows) and is_read(t, 2):
            t.result("add", total, row, shape=shape, output=2)
            total = t.values[t.node.outputs[2]]
        else:
            total = t.emit("add", total, row, shape=shape)
    if is_read(t, 1):
        if mask is None:
            t.result("full", shape=ids.shape[:1], dtype="int32", output=1, value=0)
        else:
            t.result("reduce_sum", mask, shape=ids.shape[:1], dtype="int32", output=1, axes=(1,), keepdims=False)
    return t.result("layer_norm", total, weight, shift, shape=shape, eps=float(t.attr("epsilon", 1e-12)))


def turned(t: Translation, value: Value, turn: bool) -> Value:
    """The last two dimensions exchanged."""
    shape = value.shape or ()
    if not turn:
        return value
    perm = (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)
    return t.emit("permute", value, shape=tuple(shape[i] for i in perm), perm=perm)


def fused_matmul(t: Translation, x: Inputs) -> bool:
    left, right = x
    if left is None or right is None or left.shape is None or right.shape is None or min(len(left.shape), len(right.shape)) < 2:
        return False
    if t.attr("transBatchA", 0) or t.attr("transBatchB", 0):
        return False
    left, right = turned(t, left, bool(t.attr("transA", 0))), turned(t, right, bool(t.attr("transB", 0)))
    assert left.shape is not None and right.shape is not None
    lead = broadcast([left.shape[:-2], right.shape[:-2]], t.found_equal) if len(left.shape) + len(right.shape) > 4 else ()
    shape, alpha = (*lead, left.shape[-2], right.shape[-1]), float(t.attr("alpha", 1.0))
    if alpha == 1.0:
        return t.result("matmul", left, right, shape=shape)
    return t.result("mul", t.emit("matmul", left, right, shape=shape), t.number(alpha, left.dtype), shape=shape)


def gelu(approximate: str) -> Rule:
    """BiasGelu and FastGelu: a bias, where there is one, then the activation."""

    def rule(t: Translation, x: Inputs) -> bool:
        value, bias = given(x, 2)
        if value is None or value.shape is None:
            return False
        moved = value if bias is None else t.emit("add", value, bias, shape=value.shape)
        return t.result("gelu", moved, shape=value.shape, approximate=approximate)

    return rule


def quick_gelu(t: Translation, x: Inputs) -> bool:
    value = x[0]
    if value is None or value.shape is None:
        return False
    scaled = t.emit("mul", value, t.number(float(t.attr("alpha", 1.702)), value.dtype), shape=value.shape)
    return t.result("mul", value, t.emit("sigmoid", scaled, shape=value.shape), shape=value.shape)


def bias_softmax(t: Translation, x: Inputs) -> bool:
    value, bias = x
    if value is None or bias is None or value.shape is None or bias.shape is None:
        return False
    axis = int(t.attr("axis", 1)) % len(value.shape)
    apart = len(bias.shape) == len(value.shape) and all(b in (1, v) for b, v in zip(bias.shape, value.shape, strict=True))
    if not apart or axis != len(value.shape) - 1:
        return False
    return t.result("softmax", t.emit("add", value, bias, shape=value.shape), shape=value.shape, axis=axis)


RULES: dict[str, Rule] = {
    "com.microsoft::SkipLayerNormalization": skip_norm("layer_norm"),
    "com.microsoft::SkipSimplifiedLayerNormalization": skip_norm("rms_norm"),
    "com.microsoft::EmbedLayerNormalization": embedding_norm,
    "com.microsoft::FusedMatMul": fused_matmul,
    "com.microsoft::BiasGelu": gelu("none"),
    "com.microsoft::Gelu": gelu("none"),
    "com.microsoft::FastGelu": gelu("tanh"),
    "com.microsoft::QuickGelu": quick_gelu,
    "com.microsoft::BiasSoftmax": bias_softmax,
}
