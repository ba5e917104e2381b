"""One side of a live cache that keeps its first and its newest tokens as they are, beside codes of those between.

    Ends(clause, "k").grown(k [B, G, n, D]) -> Ends        .read() -> [B, G, L, D]: first 15, what codes stand for, last 128

A token is rounded once, in its Hadamard basis where the clause has one: LATE tokens together, when the oldest of them leaves the newest
ones, so that most steps write one exact row and nothing else. Until each of them leaves too, it is read as it is. BACK tokens more than
are read stay exact: so many may be taken back. `starts` are the places of the first tokens of rows that are padded on their left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from attnopt.errors import AttnoptError
from attnopt.hosts.eviction.stored import Stored
from attnopt.hosts.eviction.uncompiled import uncompiled
from attnopt.ir.clause import Clause
from attnopt.ir.exact_ends import ExactEnds, exact_ends
from attnopt.ir.packing import Packed, unpack
from attnopt.ir.storage import hadamard

LATE = 16  # tokens that are rounded together
BACK = 24  # tokens that may be taken back: assistant models guess 20 at most


@dataclass(frozen=True)
class HeldEnds:
    """What a kernel reads for one query: exact tokens [B, G, n, D], and those between in codes; None where there are none."""

    exact: Tensor | None
    coded: Packed | None


@dataclass(frozen=True, eq=False)
class Ends:
    """coded: tokens 0 … coded.length, in their basis. first: as many as there are. newest: the last newest.length tokens, as they came.

    starts: of each sequence [B], None where all begin at 0.
    """

    clause: Clause
    side: str
    coded: Stored
    newest: Stored
    first: Tensor | None = None
    length: int = 0
    starts: Tensor | None = None

    @classmethod
    def empty(cls, clause: Clause, side: str, starts: Tensor | None = None) -> Ends:
        return cls(clause, side, Stored(form_of(clause).rows, side), Stored(None, side), starts=starts)

    @property
    def form(self) -> ExactEnds:
        return form_of(self.clause)

    @property
    def turned(self) -> bool:
        return self.side in self.form.turned

    @property
    def dtype(self) -> torch.dtype:
        return self.newest.dtype

    @property
    def rows(self) -> tuple[int, int, int]:
        """Sequences, heads and tokens."""
        assert self.newest.packed is not None
        batch, heads = self.newest.packed.codes.shape[:2]
        return (batch, heads, self.length)

    @property
    def device(self) -> torch.device:
        assert self.newest.packed is not None
        return self.newest.packed.codes.device

    @property
    def between(self) -> int:
        """The place behind the last token that is read as its code."""
        return max(0, self.length - self.form.recent)

    @uncompiled
    def grown(self, x: Tensor, spare: int = 0) -> Ends:
        """x [B, G, n, D] behind what is there. Raises InputMismatch for numbers that have no code, when they are to be rounded."""
        form, coded, before = self.form, self.coded, self.newest
        length, kept = self.length + x.shape[2], form.recent + (BACK if form.recent else 0)
        if before.length > kept and (before.room is None or not before.room.takes(x, before.length)):
            before = before.mapped(lambda y: y[:, :, y.shape[2] - kept :])
        newest = before.grown(x, LATE)
        if length - form.recent > coded.length:
            upto = min(length, length - form.recent + min(LATE - 1, form.recent))
            rows = newest.read()[:, :, coded.length - length : upto - length or None]
            coded = self.rounding(x.shape[3]).grown(self.turning(rows), max(LATE, coded.length // LATE))
        if newest.length > kept + 2 * LATE:  # a prompt
            newest = newest.mapped(lambda y: y[:, :, y.shape[2] - kept :].clone())
        return replace(self, coded=coded, newest=newest, first=self.first_with(x), length=length)

    def rounding(self, width: int) -> Stored:
        """What rounds rows of this width: a group of more channels than there are is one of all."""
        rows = self.coded.clause
        assert rows is not None
        if self.coded.packed is None and rows.count("group") > width:
            return replace(self.coded, clause=one_group(rows))
        return self.coded

    def turning(self, x: Tensor, back: bool = False) -> Tensor:
        if not self.turned:
            return x
        basis = basis_of(x.shape[-1], x.dtype, x.device)
        return x @ (basis.mT if back else basis)

    def first_with(self, x: Tensor) -> Tensor | None:
        """The first tokens [B, G, ≤ first, D], those of x among them."""
        count, old, new = self.form.first, self.length, x.shape[2]
        if self.starts is None:
            if old >= count:
                return self.first
            part = x[:, :, : count - old].clone()
            return part if self.first is None else torch.cat([self.first, part], 2)
        if not count or old >= int(self.starts.max()) + count:
            return self.first
        held = x.new_zeros(*x.shape[:2], count, x.shape[3]) if self.first is None else self.first
        place = (self.starts[:, None] + torch.arange(count, device=x.device) - old)[:, None, :, None]  # in x
        there = (place >= 0) & (place < new)
        return torch.where(there, x.take_along_dim(place.clamp(0, new - 1), 2), held)

    def read(self) -> Tensor:
        """[B, G, L, D] of what the clause means of so many tokens."""
        assert self.newest.packed is not None
        form, end = self.form, self.between
        skipped = min(form.first, end) if self.starts is None else 0
        parts = [] if self.first is None or self.starts is not None else [self.first[:, :, : min(form.first, self.length)]]
        if end > skipped:
            rows = part_of(self.coded, skipped, end)
            parts.append(self.turning(unpack(rows, self.coded.clause, self.side, self.dtype), back=True))
        already = sum(part.shape[2] for part in parts)
        if already < self.length:
            parts.append(self.newest.packed.codes[:, :, already - self.length :])
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return whole if self.starts is None or self.first is None else self.with_first(whole)

    def with_first(self, whole: Tensor) -> Tensor:
        """With the first tokens of each sequence in the places where they stand."""
        assert self.starts is not None and self.first is not None
        place = torch.arange(self.length, device=whole.device) - self.starts[:, None]
        there = ((place >= 0) & (place < self.form.first))[:, None, :, None]
        taken = self.first.take_along_dim(place.clamp(0, self.form.first - 1)[:, None, :, None], 2)
        return torch.where(there, taken, whole)

    def part(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """What `change` leaves of the tokens, read."""
        return change(self.read())

    @property
    def packed(self) -> HeldEnds | None:
        """For a kernel of one query that sees all tokens alike; None before the first one."""
        if self.newest.packed is None:
            return None
        form, end = self.form, self.between
        first = min(form.first, end)
        exact = [] if not first or self.first is None else [self.first[:, :, :first]]
        if end < self.length:
            exact.append(self.newest.packed.codes[:, :, end - self.length :])
        whole = None if not exact else exact[0] if len(exact) == 1 else torch.cat(exact, 2)
        return HeldEnds(whole, part_of(self.coded, first, end) if end > first else None)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Ends:
        """The same change of sequences to all that is held."""
        first, starts = (None if x is None else change(x) for x in (self.first, self.starts))
        return replace(self, coded=self.coded.mapped(change), newest=self.newest.mapped(change), first=first, starts=starts)

    def cut(self, length: int) -> Ends:
        """The first tokens alone, so many. Raises AttnoptError where tokens that would be exact then are held in codes alone."""
        gone, exact = self.length - length, min(self.form.recent, length)
        if exact and exact > self.newest.length - gone:
            raise AttnoptError(
                f"{gone} tokens cannot be taken back from a cache that keeps its newest ones exactly",
                where=str(self.clause),
                next_move=f"Guess at most {BACK} tokens ahead, or set model.cache_codes = None.",
            )
        if not gone:
            return self
        newest = self.newest.mapped(lambda y: y[:, :, : max(0, y.shape[2] - gone)])
        coded = self.coded.mapped(lambda y: y[:, :, : min(length, self.coded.length)])
        first = self.first if self.first is None or self.starts is not None else self.first[:, :, :length]
        return replace(self, coded=coded, newest=newest, first=first, length=length)

    @property
    def bytes(self) -> int:
        """Of all that is held, empty places too."""
        return self.coded.bytes + self.newest.bytes + (0 if self.first is None else self.first.nbytes)


def part_of(stored: Stored, first: int, end: int) -> Packed:
    assert stored.packed is not None
    parts = (stored.packed.codes, stored.packed.scales, stored.packed.zeros)
    return Packed(*(None if x is None else x[:, :, first:end] for x in parts))  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def form_of(clause: Clause) -> ExactEnds:
    found = exact_ends(clause)
    assert isinstance(found, ExactEnds)
    return found


@lru_cache(maxsize=64)
def one_group(rows: Clause) -> Clause:
    return Clause("cache", (), tuple(option for option in rows.options if option[0] != "group"))


@lru_cache(maxsize=32)
def basis_of(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it is kept, and read with gradients too
        return hadamard(width).to(device, dtype)
