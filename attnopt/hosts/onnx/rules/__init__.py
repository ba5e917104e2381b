"""One rule per ONNX operator: canonical inputs in, canonical nodes out. False leaves the operator opaque."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnopt.hosts.onnx.rules import (
    access,
    attention,
    blocks,
    composite,
    contraction,
    contrib,
    contrib_attention,
    elementwise,
    group_query_attention,
    indexing,
    layout,
    reduction,
    rotary,
    sizes,
)

RULES: dict[str, Callable[[Any, list[Any]], bool]] = {
    **layout.RULES,
    **elementwise.RULES,
    **reduction.RULES,
    **contraction.RULES,
    **access.RULES,
    **indexing.RULES,
    **composite.RULES,
    **blocks.RULES,
    **rotary.RULES,
    **attention.RULES,
    **contrib.RULES,
    **contrib_attention.RULES,
    **group_query_attention.RULES,
    **sizes.over(elementwise.RULES, access.RULES, layout.RULES),
}
# Attentions that no rule reads, and why.
UNREAD: dict[str, str] = {
    "com.microsoft::PackedAttention": "its rows are packed without padding, at offsets that are data",
    "com.microsoft::PackedMultiHeadAttention": "its rows are packed without padding, at offsets that are data",
    "com.microsoft::PagedAttention": "its keys lie in pages of a table",
    "com.microsoft::SparseAttention": "its blocks of keys are chosen by tables",
    "com.microsoft::LongformerAttention": "its window and its global keys are computed inside",
    "com.microsoft::DecoderAttention": "it keeps its cache by itself",
    "com.microsoft::DecoderMaskedSelfAttention": "its past and present share one buffer",
    "com.microsoft::DecoderMaskedMultiHeadAttention": "its past and present share one buffer",
    "com.microsoft::QAttention": "its products are of whole numbers",
    "com.microsoft::QOrderedAttention": "its products are of whole numbers",
    "com.microsoft::LinearAttention": "it is a recurrence over keys, not a softmax",
}
