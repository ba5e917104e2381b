"""The attentions that are measured on a CPU: float32, batch 1, with as few heads as long texts leave time for.

prefill causal 2048 d64   ->   q, k, v [1, 4, 2048, 64]          decode int8 32k d128 8:2   ->   q [1, 8, 1, 128], k [1, 2, 32768, 128]
"""

from __future__ import annotations

from collections.abc import Iterator

from gpu.case import Case

WINDOW = 512
MASKS = ("full", "causal", "window", "documents", "alibi")
HEADS = {128: 8, 512: 8, 2048: 4, 8192: 1}  # by length
WIDE = (512, 2048)  # lengths at which rows of 128 channels are measured besides
RATIO = 4  # query heads of a key head, where they are grouped
DECODE = (4096, 16384, 32768)
STORED = ("bf16", "int8", "int4")  # "bf16" stands for a cache as it is: float32 here


def prefill(mask: str, length: int, width: int, heads: int, key_heads: int, window: int = WINDOW) -> Case:
    return Case("prefill", mask, width, length, length, 1, heads, key_heads, window=window)


def prefills(quick: bool) -> Iterator[Case]:
    """Each mask at each length; grouped heads under a causal mask."""
    for length, heads in {128: 2}.items() if quick else HEADS.items():
        for width in (64, 128) if length in WIDE else (64,):
            for mask in MASKS:
                yield prefill(mask, length, width, heads, heads)
            grouped = max(RATIO, heads)
            yield prefill("causal", length, width, grouped, grouped // RATIO)


def decodes(quick: bool) -> Iterator[Case]:
    for length in (512,) if quick else DECODE:
        for key_heads in (8, 2):
            for cache in STORED:
                yield Case("decode", "full", 128, 1, length, 1, 8, key_heads, cache)


def named(case: Case) -> str:
    """As tables say it."""
    heads = f"{case.heads}:{case.key_heads}" if case.heads != case.key_heads else str(case.heads)
    if case.kind == "decode":
        return f"decode {'float32' if case.cache == 'bf16' else case.cache} {case.kv_len} d{case.width} x {heads}"
    mask = f"window {case.window}" if case.mask == "window" else case.mask
    return f"{mask} {case.q_len} d{case.width} x {heads}"
