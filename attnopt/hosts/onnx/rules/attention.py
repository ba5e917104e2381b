"""ONNX Attention (opset 23 to 25)  ->  attention over all keys, with causality, windows and key lengths as nodes.

Attention(q, k, v, mask, past_key, past_value; is_causal, left_window_size)
    ->  attention(q, concat(past_key, k), concat(past_value, v), where(k <= q & q - k <= left, mask, -inf))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from attnopt.hosts.onnx.element_types import dtype_name
from attnopt.hosts.onnx.rules import visibility
from attnopt.hosts.onnx.rules.heads import attend, is_read, joined, scale_of, split_heads
from attnopt.hosts.onnx.rules.layout import Inputs, Rule
from attnopt.ir.dims import Dim
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation


def attention(t: Translation, x: Inputs) -> bool:
    q, k, v, mask, past_key, past_value, lengths = (*x, *(None,) * 7)[:7]
    if q is None or k is None or v is None or q.shape is None or k.shape is None or v.shape is None:
        return t.refuse("the shapes of q, k and v are not known")
    precision = t.attr("softmax_precision")
    if precision is not None and dtype_name(ir.DataType(precision)) != q.dtype:
        return t.refuse(f"its softmax runs in {dtype_name(ir.DataType(precision))}, its data is {q.dtype}")
    if is_read(t, 3):
        return t.refuse("its scores are read as well")
    flat = len(q.shape) == 3
    if flat:
        queries, keys, values = (
            split_heads(t, value, t.attr(name)) for value, name in ((q, "q_num_heads"), (k, "kv_num_heads"), (v, "kv_num_heads"))
        )
        if queries is None or keys is None or values is None:
            return t.refuse("its widths are no multiples of its numbers of heads")
        q, k, v = queries, keys, values
    k, v = joined(t, past_key, k, 1), joined(t, past_value, v, 2)
    past: Dim = past_key.shape[2] if past_key is not None and past_key.shape is not None else 0
    if past_key is not None and past_key.shape is None:
        return t.refuse("the shape of its past is not known")
    if mask is not None and not covers_keys(t, mask, k):
        return t.refuse("its mask may be shorter than its keys")
    scale = scale_of(t, q)
    if scale is None:
        return t.refuse("the width of its heads is not known")
    left, right = int(t.attr("left_window_size", -1)), int(t.attr("right_window_size", -1))
    plain = past_key is None and lengths is None and left < 0 and right < 0
    is_causal = bool(t.attr("is_causal", 0))
    options: dict[str, Any] = {"merged": flat, "scale": scale, "softcap": float(t.attr("softcap", 0.0))}
    if plain:
        return attend(t, q, k, v, mask, causal=is_causal, **options)
    assert q.shape is not None and k.shape is not None
    at_query = visibility.query_positions(t, q.shape[-2], past)
    at_key = visibility.key_positions(t, k.shape[-2])
    valid = None
    if lengths is not None:
        each = visibility.per_batch(t, lengths)
        if each is None:
            return t.refuse("its key lengths are not one per row of the batch")
        valid = visibility.before(t, at_key, each)
        if past_key is None:  # the queries are the last of the valid keys
            behind = visibility.binary(t, "sub", each, t.size(q.shape[-2]))
            at_query = visibility.binary(t, "add", at_query, behind)
    visible = visibility.every(
        t,
        visibility.causal(t, at_query, at_key) if is_causal else None,
        visibility.within_left(t, at_query, at_key, left) if left >= 0 else None,
        visibility.within_right(t, at_query, at_key, right) if right >= 0 else None,
        valid,
    )
    if mask is not None and mask.dtype == "bool":
        visible, mask = visibility.every(t, visible, mask), None
    return attend(t, q, k, v, visibility.as_mask(t, visible, mask, q.dtype), **options)


def covers_keys(t: Translation, mask: Value, k: Value) -> bool:
    """Whether the mask's last dimension is that of the keys. From opset 24 on a shorter one hides the keys beyond."""
    if not mask.shape or not k.shape:
        return False
    width, keys = mask.shape[-1], k.shape[-2]
    if width == keys:
        return True
    return t.opset < 24 and (width == 1 or not (isinstance(width, int) and isinstance(keys, int)))


RULES: dict[str, Rule] = {"Attention": attention}
