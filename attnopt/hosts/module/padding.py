"""A prompt that is padded on its left, computed by a kernel of prompts: each row as it is alone, without its padding.

    q [B, H, L, D], mask [B, 1, L, L] of rows that begin at 3, 0, 0   ->   kernel(row 0 from 3 on), kernel(rows 1 and 2)   ->   [B, H, L, E]

So blocks of keys are counted from a row's first token, and a text is read alike in any batch. What a query of padding gets is 0: no row
reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FEWEST = 2  # tokens of a row that a kernel of prompts takes


def starts(mask: Tensor, queries: int, window: int | None) -> list[int] | None:
    """Where each row of a prompt begins, by its mask bool [B, 1, Q, K]; None where that hides more than padding and later keys.

    Keys behind the prompt, of a cache of fixed size, are hidden.
    """
    if (
        torch.compiler.is_compiling()
        or mask.dtype != torch.bool
        or mask.ndim != 4
        or mask.shape[1] != 1
        or queries > mask.shape[3]
    ):
        return None
    at, keys = torch.arange(queries, device=mask.device)[:, None], torch.arange(mask.shape[3], device=mask.device)
    seen = keys <= at if window is None else (keys <= at) & (at - keys < window)
    first = mask[:, 0].any(1).int().argmax(-1)  # the first key that a query sees
    shown = seen & (keys >= first[:, None, None])
    real = at >= first[:, None, None]
    return first.tolist() if bool(((mask[:, 0] == shown) | ~real).all()) else None


def by_rows(
    kernel: Callable[[Tensor, Tensor, Tensor], Any], q: Tensor, k: Tensor, v: Tensor, first: Sequence[int]
) -> Tensor | None:
    """[B, H, L, E] of rows that begin at `first`; None where one is too short."""
    length = q.shape[2]
    if length - max(first) < FEWEST:
        return None
    made = q.new_zeros(*q.shape[:3], v.shape[3])
    for start in dict.fromkeys(first):
        rows = [row for row, at in enumerate(first) if at == start]
        made[rows, :, start:] = kernel(*(x[rows, :, start:length].contiguous() for x in (q, k, v)))[0]
    return made
