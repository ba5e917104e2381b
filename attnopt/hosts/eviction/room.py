"""Places for the rows of one side of a cache, some of them empty: a token that comes is written into the next, and nothing moves.

    [k0 k1 k2 .  .  .]   write(k3)   ->   [k0 k1 k2 k3 .  .]        held()   ->   views of the first four

Rows that are held are never written again: a cache that was cut or copied, and grows another way, finds its next place taken and gets
a room of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import InputMismatch
from attnopt.ir.clause import Clause
from attnopt.ir.packing import Packed, pack

SPARE, SHARE = 16, 16  # places that a cache has to grow: so many, or this part of what it holds


def spare(length: int) -> int:
    """Empty places for a side of so many tokens which grows one by one."""
    return max(SPARE, length // SHARE)


@dataclass(eq=False)
class Room:
    """rows: codes [B, G, places, C], scales and zeros alike. width: of what comes. used: places that are taken. words: the clause."""

    clause: Clause | None
    side: str
    rows: Packed
    width: int
    used: int = 0
    words: str = ""

    @classmethod
    def of(cls, clause: Clause | None, side: str, x: Tensor, places: int, old: Packed | None) -> Room:
        """Room for `places` rows like those of x [B, G, n, D], with what is there already. Raises ValueError where x does not fit."""
        kinds = ((x.shape[3], x.dtype), None, None) if clause is None else kinds_of(clause, side, x.shape[3], x.dtype)
        parts: list[Any] = [
            None if kind is None else torch.empty((*x.shape[:2], places, kind[0]), dtype=kind[1], device=x.device)
            for kind in kinds
        ]
        made = cls(clause, side, Packed(*parts), x.shape[3], words=str(clause))
        if old is not None:
            if old.codes.shape[:2] != x.shape[:2]:
                raise InputMismatch(
                    f"a cache of {list(old.codes.shape[:2])} sequences and heads cannot take tokens of {list(x.shape[:2])}",
                    next_move="Start with a new cache, or repeat the sequences of this one.",
                )
            made.used = old.codes.shape[2]
            for part, held in zip(parts, (old.codes, old.scales, old.zeros), strict=True):
                if part is not None:
                    part[:, :, : made.used] = held
        return made

    def takes(self, x: Tensor, length: int) -> bool:
        """Whether x [B, G, n, D] has its place behind the first `length` rows, and may be written there."""
        codes = self.rows.codes
        fits = self.used == length and length + x.shape[2] <= codes.shape[2] and x.shape[:2] == codes.shape[:2]
        alike = x.shape[3] == self.width and x.device == codes.device and (self.clause is not None or x.dtype == codes.dtype)
        return fits and alike and (torch.is_inference_mode_enabled() or not codes.is_inference())

    def write(self, x: Tensor) -> None:
        """x [B, G, n, D] into the next places. Raises ValueError for numbers that have no code."""
        first, rows = self.used, self.rows
        if rows.scales is None:
            rows.codes[:, :, first : first + x.shape[2]] = x
        else:
            torch.ops.attnopt.cache_rows(x, rows.codes, rows.scales, rows.zeros, first, self.words, self.side)
        self.used = first + x.shape[2]

    def held(self) -> Packed:
        parts = (self.rows.codes, self.rows.scales, self.rows.zeros)
        return Packed(*(None if part is None else part[:, :, : self.used] for part in parts))  # type: ignore[arg-type]

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (self.rows.codes, self.rows.scales, self.rows.zeros) if x is not None)


@lru_cache(maxsize=64)
def kinds_of(clause: Clause, side: str, width: int, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype] | None, ...]:
    """Columns and dtype of the codes, the scales and the zero points of rows of such a width; None where there are none."""
    made = pack(torch.zeros(1, 1, 1, width, dtype=dtype), clause, side)
    return tuple(None if x is None else (x.shape[3], x.dtype) for x in (made.codes, made.scales, made.zeros))
