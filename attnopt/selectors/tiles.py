"""Which tiles of queries x keys a kernel visits: a bool for each, or the list of key blocks of each block of queries.

    Tiles(64, 64, chosen [B, H, M, N])   ->   counts int32 [B, H, M], blocks int32 [B, H, M, N] (ascending, then padding)

A kernel that is given the list does not know who chose: a selector, a fixed pattern, a user.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tiles:
    """chosen: bool [B, H, ceil(Q / rows), ceil(K / keys)]; a tile is `rows` queries by `keys` keys, less at the ends."""

    rows: int
    keys: int
    chosen: Tensor

    def listed(self) -> tuple[Tensor, Tensor]:
        """How many blocks each block of queries visits, and their numbers in ascending order, each row filled up with zeros."""
        counts = self.chosen.sum(-1)
        order = torch.argsort(~self.chosen, dim=-1, stable=True)  # chosen ones first, in their order
        places = torch.arange(order.shape[-1], device=order.device)
        return counts.to(torch.int32), torch.where(places < counts[..., None], order, 0).to(torch.int32)

    def elements(self, q_len: int, kv_len: int) -> Tensor:
        """The same as bool [B, H, Q, K]."""
        wide = self.chosen.repeat_interleave(self.keys, -1)[..., :kv_len]
        return wide.repeat_interleave(self.rows, -2)[..., :q_len, :]

    def merged(self, rows: int) -> Tiles:
        """Taller tiles that hold these: `rows` is a multiple of theirs."""
        if rows == self.rows:
            return self
        parts = self.chosen.split(rows // self.rows, -2)
        return Tiles(rows, self.keys, torch.stack([part.any(-2) for part in parts], -2))

    def share_of(self, shown: Tensor) -> float:
        """How many of the tiles that the mask shows (bool, of the same shape) are chosen: the kept fraction."""
        shown = shown.expand_as(self.chosen)
        return float((self.chosen & shown).sum() / shown.sum().clamp(min=1))


@dataclass(frozen=True, eq=False)
class Choice:
    """What a selector returns: tiles to visit, and where a query sees less than its tiles say, which blocks it sees.

    each: bool [B, H, Q, ceil(K / tiles.keys)], or None where the tiles say all.
    """

    tiles: Tiles
    each: Tensor | None = None

    def elements(self, q_len: int, kv_len: int) -> Tensor:
        """What is selected as bool [B, H, Q, K], before the mask."""
        if self.each is None:
            return self.tiles.elements(q_len, kv_len)
        return self.each.repeat_interleave(self.tiles.keys, -1)[..., :kv_len]
