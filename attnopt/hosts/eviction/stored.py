"""One side of a live cache, as it is or in codes: grown, cut, gathered and read.

    Stored(clause, "k").grown(k [B, G, n, D]) -> Stored          .taken(index [B, G, C])          .read() -> [B, G, L, D]

With a clause such as `cache(k=int8, v=int8)` every token is rounded once, when it comes, and read as its codes stand for it: what the
clause means to the last bit. Codes are kept by token, so that a token can leave without touching another. They stand in a `Room`, which
may have places for more of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from attnopt.errors import InputMismatch
from attnopt.hosts.eviction.room import Room
from attnopt.hosts.eviction.uncompiled import uncompiled
from attnopt.ir.clause import Clause
from attnopt.ir.packing import Packed, pack, refusal, unpack
from attnopt.ir.spec import as_spec


@dataclass(frozen=True, eq=False)
class Stored:
    """clause: how rows are kept; None is as they come. packed: None before the first token. dtype: of what is read.

    room: where the rows of `packed` stand, while they do.
    """

    clause: Clause | None
    side: str
    packed: Packed | None = None
    dtype: torch.dtype = torch.float32
    room: Room | None = None

    @property
    def length(self) -> int:
        return 0 if self.packed is None else self.packed.codes.shape[2]

    @property
    def rows(self) -> tuple[int, int, int]:
        """Sequences, heads and tokens."""
        assert self.packed is not None
        batch, heads, length, _ = self.packed.codes.shape
        return (batch, heads, length)

    @property
    def device(self) -> torch.device:
        assert self.packed is not None
        return self.packed.codes.device

    @uncompiled
    def grown(self, x: Tensor, spare: int = 0) -> Stored:
        """x [B, G, n, D] behind what is there. spare: places that stay empty behind it, where all must move to make room for it.

        Raises InputMismatch for numbers that the clause cannot hold.
        """
        try:
            if x.requires_grad:  # nothing is written in place
                new = Packed(x) if self.clause is None else pack(x, self.clause, self.side)
                return replace(self, packed=new if self.packed is None else joined(self.packed, new), dtype=x.dtype, room=None)
            length, count, room = self.length, x.shape[2], self.room
            if room is None or not room.takes(x, length):
                room = Room.of(self.clause, self.side, x, length + count + spare, self.packed)
            room.write(x)
        except ValueError as error:
            raise InputMismatch(str(error), where=str(self.clause), next_move="Leave store= out.") from error
        return replace(self, packed=room.held(), dtype=x.dtype, room=room)

    def taken(self, index: Tensor) -> Stored:
        """The tokens at index [B, G, C]."""
        return self.mapped(lambda x: x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1])))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Stored:
        if self.packed is None:
            return self
        parts = (None if x is None else change(x) for x in (self.packed.codes, self.packed.scales, self.packed.zeros))
        return replace(self, packed=Packed(*parts), room=None)  # type: ignore[arg-type]

    def cut(self, length: int) -> Stored:
        """The first tokens alone, so many."""
        return self.mapped(lambda x: x[:, :, :length])

    def part(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """What `change` leaves of the tokens: the others are not read."""
        return self.mapped(change).read()

    def read(self) -> Tensor:
        """[B, G, L, D]."""
        assert self.packed is not None
        return self.packed.codes if self.clause is None else unpack(self.packed, self.clause, self.side, self.dtype)

    @property
    def bytes(self) -> int:
        """Of all that is held, empty places too."""
        if self.room is not None:
            return self.room.bytes
        held = () if self.packed is None else (self.packed.codes, self.packed.scales, self.packed.zeros)
        return sum(x.numel() * x.element_size() for x in held if x is not None)


def joined(old: Packed, new: Packed) -> Packed:
    pairs = ((old.codes, new.codes), (old.scales, new.scales), (old.zeros, new.zeros))
    return Packed(*(None if a is None or b is None else torch.cat([a, b], 2) for a, b in pairs))  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def storage(words: str | None) -> Clause | None:
    """ "int8" or "cache(k=int8, v=int4, group=32)" as a clause. Raises InputMismatch where tokens could not leave one by one."""
    if words is None:
        return None
    line = words if "(" in words else f"cache(k={words}, v={words})"
    clause = as_spec(f"softmax {line}").cache
    if clause is None:
        raise InputMismatch(f"'{words}' is no form of a cache", next_move='Write store="int8" or store="cache(k=int8, v=int4)".')
    if (refused := refusal(clause)) is not None:
        raise InputMismatch(refused.reason, where=line, next_move='Write store="int8".')
    if any(clause.word(f"{side}_axis") == "channel" for side in "kv"):
        raise InputMismatch(
            "channels that share a scale over tokens cannot lose one of them", where=line, next_move="Use axis=token."
        )
    return clause
