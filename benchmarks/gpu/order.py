"""Every row of the benchmark, important ones first: a run that reaches its deadline has measured those.

goals at 16k and 128k   ->   the other widths   ->   the other lengths   ->   the rest of the grid
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from gpu.case import ROUNDED, STORED, Case

WIDTHS = (128, 64, 256)
LENGTHS = (16384, 4096, 32768, 1024)
CHANNELS = 2048  # of all heads together
TOKENS = 16384  # of a prefill: shorter texts come in batches
CACHED = (131072, 32768, 4096)
BATCHES = (8, 64, 1)
KEY_HEADS = 8
RATIOS = (4, 8)


def prefills() -> list[Case]:
    return [
        Case("prefill", mask, width, length, length, max(1, TOKENS // length), CHANNELS // width, CHANNELS // width)
        for width in WIDTHS
        for length in LENGTHS
        for mask in ("causal", "window", "documents", "softcap", "alibi", "full")
    ]


def rounded() -> list[Case]:
    """Prefills with narrow products, of the masks that all libraries have."""
    return [
        replace(case, rounded=kind)
        for case in prefills()
        for kind in ROUNDED
        if kind and case.mask in ("causal", "full") and case.width in (64, 128) and case.kv_len in (4096, 16384)
    ]


def decodes() -> list[Case]:
    return [
        Case("decode", "full", 128, 1, length, batch, KEY_HEADS * ratio, KEY_HEADS, cache)
        for length in CACHED
        for batch in BATCHES
        for ratio in RATIOS
        for cache in STORED
    ]


def rows() -> list[Case]:
    """All cases, each once."""
    groups: tuple[tuple[list[Case], Callable[[Case], bool]], ...] = (
        (prefills(), lambda c: (c.width, c.kv_len) == (128, 16384)),
        (decodes(), lambda c: (c.kv_len, c.batch, c.heads) == (131072, 8, 32)),
        (rounded(), lambda c: (c.width, c.kv_len) == (128, 16384)),
        (prefills(), lambda c: (c.width, c.kv_len) == (64, 16384)),
        (rounded(), lambda c: c.kv_len == 16384),
        (decodes(), lambda c: (c.batch, c.heads) == (8, 32)),
        (decodes(), lambda c: c.heads == 32),
        (prefills(), lambda c: c.width == 128 and c.kv_len in (4096, 32768)),
        (rounded(), lambda c: True),
        (prefills(), lambda c: c.kv_len == 16384),
        (decodes(), lambda c: True),
        (prefills(), lambda c: c.width == 128),
        (prefills(), lambda c: True),
    )
    return list(dict.fromkeys(case for cases, wanted in groups for case in cases if wanted(case)))


def small(cases: Iterable[Case]) -> list[Case]:
    """The first case of each mask, cache and type of products, tiny."""
    found: dict[tuple[str, str, str, str], Case] = {}
    for case in cases:
        if case.kind == "decode" or case.width == 64:
            found.setdefault((case.kind, case.mask, case.cache, case.rounded), case.small())
    return list(found.values())
