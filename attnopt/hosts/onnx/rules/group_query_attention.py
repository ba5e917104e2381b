"""com.microsoft::GroupQueryAttention  ->  attention over past and new keys, its causality, window and lengths as nodes.

    GroupQueryAttention(q, k, v, past_k, past_v, seqlens_k, total, cos, sin; local_window_size=w, do_rotary=1)
        ->  attention(rotary(q), concat(past_k, rotary(k)), concat(past_v, v), k <= q & q - k < w)

`seqlens_k` is the last key of every row of the batch. Where it is known to be the last of all, it hides nothing.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from attnopt.hosts.onnx.lengths import add
from attnopt.hosts.onnx.rules import visibility
from attnopt.hosts.onnx.rules.heads import attend, is_read, joined, part, scale_of, split_heads
from attnopt.hosts.onnx.rules.layout import Inputs, Rule
from attnopt.hosts.onnx.rules.rotary import looked_up, rotated
from attnopt.ir.dims import Dim, divide
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation

NEVER = (  # inputs beyond the bias, and what they mean
    "its softmax has sinks", "its cache is quantised", "its cache is quantised", "it normalises its queries", "it normalises its keys",
    "its rows have several numbers of queries",
)  # fmt: skip
FIRST_NEVER = 11


def group_query_attention(t: Translation, x: Inputs) -> bool:
    q, k, v, past_key, past_value, lengths, _, cos, sin, positions, bias = (*x, *(None,) * 17)[:11]
    reason = beyond(t, x)
    if reason:
        return t.refuse(reason)
    heads, groups = int(t.attr("num_heads")), int(t.attr("kv_num_heads"))
    placed = placed_heads(t, q, k, v, heads, groups)
    if placed is None:
        return t.refuse("its inputs are neither [B, L, H*D] nor packed together, or their shapes are not known")
    queries, keys, values = placed
    assert queries.shape is not None and keys.shape is not None
    new = queries.shape[2]
    if keys.shape[2] != new and past_key is None:
        return t.refuse("it has other keys than those of its queries")
    past: Dim = 0
    last = visibility.uniform(lengths)
    if past_key is not None:
        if past_key.shape is None:
            return t.refuse("the shape of its past is not known")
        past = past_key.shape[2]
        if last is None:
            return t.refuse("the length of its past may differ from row to row: seqlens_k is data")
        if add(last, 1) != add(past, new):
            return t.refuse(f"its past and present share one buffer: {past} past and {new} new keys, {add(last, 1)} in all")
    scale = scale_of(t, queries)
    if scale is None:
        return t.refuse("the width of its heads is not known")
    at_query = visibility.query_positions(t, new, past)
    if t.attr("do_rotary", 0):
        if positions is not None and past_key is None:
            positions = counted_from_first(t, positions, at_query)
        tables = rotary_tables(t, cos, sin, positions, at_query)
        if tables is None:
            return t.refuse("its rotary tables have shapes that are not known")
        queries, keys = (rotated(t, value, *tables, bool(t.attr("rotary_interleaved", 0))) for value in (queries, keys))
    keys, values = joined(t, past_key, keys, 1), joined(t, past_value, values, 2)
    return attended(t, queries, keys, values, at_query, lengths if last is None else None, bias, scale)


def attended(
    t: Translation, q: Value, k: Value, v: Value, at_query: Value, lengths: Value | None, bias: Value | None, scale: float
) -> bool:
    assert q.shape is not None and k.shape is not None
    options: dict[str, Any] = {"merged": True, "scale": scale, "softcap": float(t.attr("softcap", 0.0))}
    window, causal = int(t.attr("local_window_size", -1)), bool(t.attr("causal", 1))
    if window <= 0 and lengths is None and q.shape[2] == k.shape[2]:
        return attend(t, q, k, v, bias, causal=causal, **options)
    at_key = visibility.key_positions(t, k.shape[2])
    each = None
    if lengths is not None:
        held = visibility.per_batch(t, lengths)
        if held is None:
            return t.refuse("its key lengths are not one per row of the batch")
        each = visibility.binary(t, "le", at_key, held, "bool")
    visible = visibility.every(
        t,
        visibility.causal(t, at_query, at_key) if causal else None,
        visibility.within_left(t, at_query, at_key, window - 1) if window > 0 else None,  # the query's own key counts
        each,
    )
    return attend(t, q, k, v, visibility.as_mask(t, visible, bias, q.dtype), **options)


def beyond(t: Translation, x: Inputs) -> str:
    """Why this is more than a softmax over scores, in words; "" where it is not."""
    for name, given in zip(NEVER, x[FIRST_NEVER:], strict=False):
        if given is not None:
            return name
    if t.attr("smooth_softmax", 0) == 1:
        return "its softmax has a sink"
    if any(t.attr(name, "NONE") not in ("NONE", b"NONE") for name in ("k_quant_type", "v_quant_type")):
        return "its cache is quantised"
    if t.attr("sliding_window_cache", 0):
        return "its cache keeps a window of keys only"
    return "its scores are read as well" if is_read(t, 3) else ""


def placed_heads(
    t: Translation, q: Value | None, k: Value | None, v: Value | None, heads: int, groups: int
) -> tuple[Value, Value, Value] | None:
    """q [B, H, L, D], k and v [B, G, L, D], out of three tensors or of one [B, L, (H + 2 G) * D]."""
    if q is None or q.shape is None or len(q.shape) != 3:
        return None
    if k is None and v is None:
        width = divide(q.shape[2], heads + 2 * groups)
        if not isinstance(width, int):
            return None
        bounds = (0, heads * width, (heads + groups) * width, (heads + 2 * groups) * width)
        q, k, v = (part(t, q, 2, a, b) for a, b in pairwise(bounds))
    if k is None or v is None or k.shape is None or v.shape is None or len(k.shape) != 3:
        return None
    made = split_heads(t, q, heads), split_heads(t, k, groups), split_heads(t, v, groups)
    return None if None in made else made  # type: ignore[return-value]


def counted_from_first(t: Translation, positions: Value, at_query: Value) -> Value:
    """[1, L]: of a prompt's positions the kernel reads the very first and counts on."""
    first = part(t, part(t, positions, 0, 0, 1), 1, 0, 1)
    length = (at_query.shape or (0,))[0]
    return visibility.binary(t, "add", t.emit("reshape", at_query, shape=(1, length)), first)


def rotary_tables(
    t: Translation, cos: Value | None, sin: Value | None, positions: Value | None, at_query: Value
) -> tuple[Value, Value] | None:
    """Cosines and sines [B, 1, L, R/2] at the positions given, else at those after the past."""
    if cos is None or sin is None or not cos.shape or not isinstance(cos.shape[-1], int):
        return None
    if positions is None:
        length = (at_query.shape or (0,))[0]
        positions = t.emit("reshape", at_query, shape=(1, length))
    tables = [looked_up(t, table, positions, heads_at=1) for table in (cos, sin)]
    return None if None in tables else (tables[0], tables[1])  # type: ignore[return-value]


RULES: dict[str, Rule] = {"com.microsoft::GroupQueryAttention": group_query_attention}
