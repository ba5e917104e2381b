"""Attention and MultiHeadAttention of com.microsoft, as onnxruntime and its optimisers write them  ->  canonical nodes.

    Attention(x, w, b, mask [B, K]; num_heads, unidirectional)
        ->  slices of x w + b as q, k, v; attention(q, k, v, where(k <= q, where(mask > 0, 0, -10000), lowest))

Padding adds `mask_filter_value` and hides nothing by itself; causality fills with the smallest finite number.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from attnopt.hosts.onnx.rules import visibility
from attnopt.hosts.onnx.rules.heads import attend, is_read, joined, part, scale_of, split_heads
from attnopt.hosts.onnx.rules.layout import Inputs, Rule
from attnopt.ir.dims import Dim, Shape
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation

FILTER = -10000.0  # mask_filter_value where none is given


def attention(t: Translation, x: Inputs) -> bool:
    """com.microsoft::Attention: projections of one weight, then heads side by side."""
    states, weight, shift, padding, past, added, shared = (*x, *(None,) * 7)[:7]
    if states is None or weight is None or states.shape is None or weight.shape is None or len(states.shape) != 3:
        return t.refuse("the shapes of its input and weight are not known")
    if shared is not None or t.attr("past_present_share_buffer", 0):
        return t.refuse("its past and present share one buffer")
    if t.attr("do_rotary", 0):
        return t.refuse("it applies rotary positions of its own")
    heads, total = int(t.attr("num_heads")), weight.shape[1]
    sizes = t.attr("qkv_hidden_sizes") or ([total // 3] * 3 if isinstance(total, int) else None)
    if not sizes or sizes[0] != sizes[1] or any(size % heads for size in sizes):
        return t.refuse("the widths of q, k and v are not known, or no multiples of the heads")
    shape: Shape = (*states.shape[:2], total)
    packed = t.emit("matmul", states, weight, shape=shape)
    if shift is not None:
        packed = t.emit("add", packed, shift, shape=shape)
    bounds = (0, sizes[0], sizes[0] + sizes[1], sum(sizes))
    parts = [split_heads(t, part(t, packed, 2, a, b), heads) for a, b in pairwise(bounds)]
    q, k, v = (p for p in parts if p is not None)
    before = (None, None)
    if past is not None:
        if past.shape is None or len(past.shape) != 5:
            return t.refuse("the shape of its past is not known")
        before = tuple(t.emit("reshape", part(t, past, 0, i, i + 1), shape=past.shape[1:]) for i in (0, 1))  # type: ignore[assignment]
    k, v = joined(t, before[0], k), joined(t, before[1], v)
    if is_read(t, 1):
        both = [t.emit("reshape", s, shape=(1, *(s.shape or ()))) for s in (k, v)]
        t.result("concat", *both, shape=(2, *(k.shape or ())), output=1, axis=0)
    return masked(t, q, k, v, padding, added, past.shape[3] if past is not None and past.shape else 0)


def multi_head_attention(t: Translation, x: Inputs) -> bool:
    """com.microsoft::MultiHeadAttention on [B, L, H*D], on heads apart, or on queries, keys and values in one tensor."""
    q, k, v, shift, padding, added, past_key, past_value, *rest = (*x, *(None,) * 10)[:10]
    if q is None or q.shape is None or any(i is not None and i.shape is None for i in (k, v, past_key)):
        return t.refuse("the shapes of its inputs are not known")
    if any(r is not None for r in rest):
        return t.refuse("its past and present share one buffer")
    if is_read(t, 3):
        return t.refuse("its scores are read as well")
    heads = int(t.attr("num_heads"))
    placed = unpacked(t, q, k, v, heads)
    if placed is None:
        return t.refuse("its inputs are neither [B, L, H*D], nor heads apart, nor packed together")
    if shift is not None:
        placed = shifted(t, placed, shift, heads)
        if placed is None:
            return t.refuse("its bias does not fit its heads")
    queries, keys, values = placed
    if k is not None and len(k.shape or ()) == 4 and past_key is not None:
        return t.refuse("it has a past, and keys with heads apart")
    keys, values = joined(t, past_key, keys, 1), joined(t, past_value, values, 2)
    past: Dim = past_key.shape[2] if past_key is not None and past_key.shape is not None else 0
    return masked(t, queries, keys, values, padding, added, past)


def unpacked(t: Translation, q: Value, k: Value | None, v: Value | None, heads: int) -> tuple[Value, Value, Value] | None:
    """q, k and v as [B, H, L, D], out of [B, L, H, 3, D], or of q and [B, L, H, 2, D], or one by one."""
    if k is None:
        return one_of(t, q, 3) if len(q.shape or ()) == 5 else None  # type: ignore[return-value]
    queries = split_heads(t, q, heads) if len(q.shape or ()) == 3 else None
    if v is None:
        pair = one_of(t, k, 2) if len(k.shape or ()) == 5 else ()
        return None if queries is None or len(pair) != 2 else (queries, *pair)  # type: ignore[return-value]
    others = [x if len(x.shape or ()) == 4 else split_heads(t, x, heads) if len(x.shape or ()) == 3 else None for x in (k, v)]
    return None if queries is None or None in others else (queries, *others)  # type: ignore[return-value]


def one_of(t: Translation, packed: Value, count: int) -> tuple[Value, ...]:
    """[B, L, H, n, D] as n tensors [B, H, L, D]."""
    batch, length, heads, _, width = packed.shape or ()
    alone = [t.emit("reshape", part(t, packed, 3, i, i + 1), shape=(batch, length, heads, width)) for i in range(count)]
    return tuple(t.emit("permute", a, shape=(batch, heads, length, width), perm=(0, 2, 1, 3)) for a in alone)


def shifted(t: Translation, placed: tuple[Value, ...], shift: Value, heads: int) -> tuple[Value, Value, Value] | None:
    """Add a bias for q, k and v that lies in one row [H*D + H*D + H*Dv]."""
    made = []
    at = 0
    for value in placed:
        width = (value.shape or ("",))[-1]
        if not isinstance(width, int) or not shift.shape or not isinstance(shift.shape[0], int):
            return None
        own = part(t, shift, 0, at, at + heads * width)
        apart = t.emit("reshape", own, shape=(heads, 1, width))
        made.append(t.emit("add", value, apart, shape=value.shape or ()))
        at += heads * width
    return tuple(made) if at == shift.shape[0] else None  # type: ignore[index, return-value]


def masked(t: Translation, q: Value, k: Value, v: Value, padding: Value | None, added: Value | None, past: Dim) -> bool:
    """The attention, with padding and bias added to its scores and the future hidden where it is unidirectional."""
    assert q.shape is not None and k.shape is not None
    scale = scale_of(t, q)
    if scale is None:
        return t.refuse("the width of its heads is not known")
    at_key = visibility.key_positions(t, k.shape[-2])
    bias = added
    if padding is not None:
        seen = seen_keys(t, padding, at_key, q, k)
        if seen is None:
            return t.refuse(
                f"its mask of shape [{', '.join(map(str, padding.shape or ()))}] is none that onnxruntime's CPU reads"
            )
        bias = visibility.filled(t, seen, q.dtype, float(t.attr("mask_filter_value", FILTER)))
        if added is not None:
            bias = visibility.binary(t, "add", bias, added)
    if not t.attr("unidirectional", 0):
        return attend(t, q, k, v, bias, merged=True, scale=scale)
    if past == 0 and q.shape[-2] == k.shape[-2]:
        return attend(t, q, k, v, bias, merged=True, scale=scale, causal=True)
    visible = visibility.causal(t, visibility.query_positions(t, q.shape[-2], past), at_key)
    if bias is None:
        return attend(t, q, k, v, visible, merged=True, scale=scale)
    lowest = torch.finfo(getattr(torch, q.dtype)).min
    return attend(t, q, k, v, visibility.filled(t, visible, q.dtype, lowest, bias), merged=True, scale=scale)


def seen_keys(t: Translation, mask: Value, at_key: Value, q: Value, k: Value) -> Value | None:
    """The keys that are not padding, from a mask [B, K] or [B, Q, K] of ones and zeros, or from lengths [B]."""
    shape, keys = mask.shape or (), (k.shape or (0, 0))[-2]
    batch = (q.shape or (0,))[0]
    if len(shape) == 1 and shape[0] == batch:  # [2 B] and [3 B + 2] say where rows begin as well
        lengths = visibility.per_batch(t, mask)
        return None if lengths is None else visibility.before(t, at_key, lengths)
    if len(shape) not in (2, 3) or isinstance(shape[-1], int) != isinstance(keys, int) or mask.dtype != "int32":
        return None
    if isinstance(keys, int) and shape[-1] != keys:
        return None
    ones = visibility.binary(t, "gt", mask, t.number(0, "int32"), "bool")
    return t.emit("reshape", ones, shape=(shape[0], *((1, 1) if len(shape) == 2 else (1, shape[1])), keys))


RULES: dict[str, Rule] = {
    "com.microsoft::Attention": attention,
    "com.microsoft::MultiHeadAttention": multi_head_attention,
}
