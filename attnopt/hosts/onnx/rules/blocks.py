"""LayerNormalization, RMSNormalization, Attention  ->  layer_norm, rms_norm, attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from attnopt.hosts.onnx.element_types import dtype_name
from attnopt.hosts.onnx.rules.layout import Inputs, Rule
from attnopt.ir.dims import divide, product
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation


def outputs_read(t: Translation, first: int) -> bool:
    """Whether anything reads the outputs from this one on."""
    return any(o.uses() or o.is_graph_output() for o in t.node.outputs[first:])


def over_last_axis(t: Translation, value: Value | None) -> bool:
    return value is not None and value.shape is not None and t.attr("axis", -1) in (-1, len(value.shape) - 1)


def layer_norm(t: Translation, x: Inputs) -> bool:
    if not over_last_axis(t, x[0]) or outputs_read(t, 1):
        return False
    bias = x[2] if len(x) > 2 else None
    return t.result("layer_norm", x[0], x[1], bias, shape=x[0].shape, eps=float(t.attr("epsilon", 1e-5)))  # type: ignore[union-attr]


def rms_norm(t: Translation, x: Inputs) -> bool:
    if not over_last_axis(t, x[0]) or outputs_read(t, 1):
        return False
    return t.result("rms_norm", x[0], x[1], shape=x[0].shape, eps=float(t.attr("epsilon", 1e-5)))  # type: ignore[union-attr]


def attention(t: Translation, x: Inputs) -> bool:
    """Attention without past, second outputs, windows or other softmax precision; 3-D inputs are split into heads."""
    q, k, v, mask, *rest = (*x, None, None, None, None)
    windowed = any(t.attr(name, -1) >= 0 for name in ("left_window_size", "right_window_size"))
    if any(r is not None for r in rest) or outputs_read(t, 1) or windowed:
        return False
    precision = t.attr("softmax_precision")
    if precision is not None and q is not None and dtype_name(ir.DataType(precision)) != q.dtype:
        return False
    if q is None or k is None or v is None or q.shape is None or k.shape is None or v.shape is None:
        return False
    flat = len(q.shape) == 3
    if flat:
        parts = [
            split_heads(t, value, t.attr(name)) for value, name in ((q, "q_num_heads"), (k, "kv_num_heads"), (v, "kv_num_heads"))
        ]
        if any(p is None for p in parts):
            return False
        q, k, v = parts  # type: ignore[assignment]
    assert q.shape is not None and v.shape is not None  # type: ignore[union-attr]
    if mask is not None and not covers_keys(t, mask, k):  # type: ignore[arg-type]
        return False
    width = q.shape[-1]  # type: ignore[union-attr]
    scale = t.attr("scale")
    if scale is None and not isinstance(width, int):
        return False
    shape = (*q.shape[:-1], v.shape[-1])  # type: ignore[union-attr]
    options = {
        "causal": bool(t.attr("is_causal", 0)),
        "scale": float(scale if scale is not None else width**-0.5),  # type: ignore[operator]
        "softcap": float(t.attr("softcap", 0.0)),
    }
    if not flat:
        return t.result("attention", q, k, v, mask, shape=shape, **options)
    made = t.emit("attention", q, k, v, mask, shape=shape, **options)
    return merge_heads(t, made)


def covers_keys(t: Translation, mask: Value, k: Value) -> bool:
    """Whether the mask's last dimension is that of the keys. From opset 24 on a shorter one hides the keys beyond."""
    if not mask.shape or not k.shape:
        return False
    width, keys = mask.shape[-1], k.shape[-2]
    if width == keys:
        return True
    return t.opset < 24 and (width == 1 or not (isinstance(width, int) and isinstance(keys, int)))


def multi_head_attention(t: Translation, x: Inputs) -> bool:
    """com.microsoft::MultiHeadAttention on [B, L, H*D], as attnopt writes it: an additive bias at most, nothing cached or packed."""
    q, k, v, bias, padding, added, *rest = (*x, *(None,) * 10)[:10]
    plain = bias is None and padding is None and all(r is None for r in rest) and not outputs_read(t, 1)
    if not plain or q is None or k is None or v is None or any(i.shape is None or len(i.shape) != 3 for i in (q, k, v)):
        return False
    heads = int(t.attr("num_heads"))
    parts = [split_heads(t, value, heads) for value in (q, k, v)]
    causal = bool(t.attr("unidirectional", 0))
    if any(p is None for p in parts) or (causal and q.shape[1] != k.shape[1]):  # type: ignore[index]
        return False
    width = parts[0].shape[-1]  # type: ignore[union-attr, index]
    if not t.attr("scale") and not isinstance(width, int):
        return False
    scale = float(t.attr("scale") or width**-0.5)  # type: ignore[operator]
    shape = (*parts[0].shape[:-1], parts[2].shape[-1])  # type: ignore[union-attr, index]
    made = t.emit("attention", *parts, added, shape=shape, causal=causal, scale=scale, softcap=0.0)
    return merge_heads(t, made)


def merge_heads(t: Translation, value: Value) -> bool:
    """[B, H, L, D] as [B, L, H*D]: the output of the node."""
    batch, heads, length, width = value.shape or (0, 0, 0, 0)
    apart = t.emit("permute", value, shape=(batch, length, heads, width), perm=(0, 2, 1, 3))
    return t.result("reshape", apart, shape=(batch, length, product([heads, width])))


def split_heads(t: Translation, value: Value, heads: int | None) -> Value | None:
    """[B, L, H*D] as [B, H, L, D]."""
    batch, length, width = value.shape or (0, 0, 0)
    each = divide(width, heads) if heads else None
    if each is None or heads is None:
        return None
    apart = t.emit("reshape", value, shape=(batch, length, heads, each))
    return t.emit("permute", apart, shape=(batch, heads, length, each), perm=(0, 2, 1, 3))


RULES: dict[str, Rule] = {
    "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm,
    "SimplifiedLayerNormalization": rms_norm,
    "Attention": attention,
    "com.microsoft::MultiHeadAttention": multi_head_attention,
}
