"""Channels of queries and keys that are far larger than the others of their head: what must be kept well when the rest is rounded.

    M[h, j] = ||Q[:, h, j]||          massive where M[h, j] > factor * mean over j of M[h, :]          the same for K; V should have none

Models with rotary positions hold them in the slow channels, at the same places in many heads; what they carry is the context at hand.
Source: "Massive Values in Self-Attention Modules are the Key to Contextual Knowledge Understanding".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.analysis.statistics import AttentionStatistics, ChannelStatistics
from attnopt.ir.block import Rotary

FACTOR = 5.0


@dataclass(frozen=True, eq=False)
class MassiveValues:
    """Which channels are massive, bool [heads, width] for q, k and v. slow: the share of those of q and k that turn slowest.

    aligned: the share of massive channels of keys that are massive in a query head that reads them.
    """

    site: str
    q: Tensor
    k: Tensor
    v: Tensor
    slow: float | None
    aligned: float | None

    @property
    def found(self) -> bool:
        return bool(self.q.any() or self.k.any())


def massive_values(
    seen: AttentionStatistics, heads: tuple[int, int, int], rotary: Rotary | None = None, factor: float = FACTOR
) -> MassiveValues:
    """heads: of q, k and v. With the rotation of the block also which share of the massive channels turns slowly."""
    q, k, v = (massive(part, count, factor) for part, count in zip((seen.q, seen.k, seen.v), heads, strict=True))
    both = torch.cat([q, k])
    slow = None
    if rotary is not None and bool(both.any()):
        slow = float((both & slow_channels(rotary, both.shape[1])).sum() / both.sum())
    read = q.unflatten(0, (len(k), -1)).any(1) if len(q) % len(k) == 0 else None
    aligned = float((k & read).sum() / k.sum()) if read is not None and bool(k.any()) else None
    return MassiveValues(seen.site, q, k, v, slow, aligned)


def massive(channels: ChannelStatistics, heads: int, factor: float) -> Tensor:
    """bool [heads, width]."""
    length = (channels.mean_square * channels.rows).sqrt().unflatten(0, (heads, -1))
    return length > factor * length.mean(1, keepdim=True)


def slow_channels(rotary: Rotary, width: int) -> Tensor:
    """bool [width]: the half of the turning channels whose frequency is lowest; both channels of a pair turn alike."""
    slow = rotary.inv_freq.double() <= rotary.inv_freq.double().median()
    pairs = slow.repeat_interleave(2) if rotary.interleaved else slow.repeat(2)
    found = torch.zeros(width, dtype=torch.bool)
    found[rotary.first : rotary.first + rotary.dims] = pairs
    return found
