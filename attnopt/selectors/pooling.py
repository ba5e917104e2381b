"""Blocks of rows as one row each: means, smallest and largest channels, and how alike the rows of a block are.

x [B, H, L, D]   ->   [B, H, ceil(L / block), D]         the last block may be short
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def pooled(x: Tensor, block: int, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`reduce(rows [B, H, N, block, D], axis 3)` of every block."""
    whole = x.shape[2] // block * block
    made = [reduce(x[:, :, :whole].unflatten(2, (-1, block)), 3)] if whole else []
    if whole < x.shape[2]:
        made.append(reduce(x[:, :, None, whole:], 3))
    return made[0] if len(made) == 1 else torch.cat(made, 2)


def means(x: Tensor, block: int) -> Tensor:
    return pooled(x, block, torch.mean)


def lowest(x: Tensor, block: int) -> Tensor:
    return pooled(x, block, torch.amin)


def highest(x: Tensor, block: int) -> Tensor:
    return pooled(x, block, torch.amax)


def alikeness(x: Tensor, block: int) -> Tensor:
    """Mean cosine between all pairs of rows of each block, [B, H, N]: the squared length of the mean unit row."""
    return means(F.normalize(x, dim=-1), block).square().sum(-1)


def for_heads(x: Tensor, heads: int) -> Tensor:
    """[B, G, …] of key heads, repeated for the query heads that share them."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
