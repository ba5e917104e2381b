"""The smallest and largest channels of the keys of each page of a live cache, kept up to date as tokens come.

    Bounds(16).grown(keys [B, G, L, D])   ->   state: low, high [B, G, ceil(L / 16), D], of L keys

Of keys that come, the pages that they fall into are read, and no other. Bounds stand in a room with empty places, as rows of a cache do:
the newest page is written in place, by the one history of tokens that wrote there last. Another that began with the same tokens gets a
room of its own.

Source: "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.hosts.eviction.uncompiled import uncompiled
from attnopt.selectors.pages import PageState
from attnopt.selectors.pooling import highest, lowest

SPARE, SHARE = 4, 16  # pages that there is room for behind those of a prompt: so many, or this part of them


@dataclass(eq=False)
class PageRoom:
    """low, high [B, G, places, D]; keys: how many were counted into them."""

    low: Tensor
    high: Tensor
    keys: int

    def takes(self, keys: Tensor, length: int, count: int) -> bool:
        """Whether bounds of `length` keys grow here to `count` pages, by those of keys [B, G, L, D]."""
        fits = self.keys == length and count <= self.low.shape[2] and keys.shape[:2] == self.low.shape[:2]
        alike = keys.dtype == self.low.dtype and keys.device == self.low.device and keys.shape[3] == self.low.shape[3]
        return fits and alike and (torch.is_inference_mode_enabled() or not self.low.is_inference())


@dataclass(frozen=True, eq=False)
class Bounds:
    """size: keys of a page. length: keys so far."""

    size: int
    length: int = 0
    room: PageRoom | None = None

    @property
    def state(self) -> PageState:
        """Of the pages that there are; raises ValueError where there is no key."""
        if self.room is None:
            raise ValueError("a cache without keys has no pages")
        count = -(-self.length // self.size)
        return PageState(self.room.low[:, :, :count], self.room.high[:, :, :count], self.length)

    @property
    def bytes(self) -> int:
        return 0 if self.room is None else self.room.low.nbytes + self.room.high.nbytes

    @uncompiled
    @torch.no_grad()
    def grown(self, keys: Tensor) -> Bounds:
        """keys [B, G, L, D]: all that are held; those that were counted already come first."""
        length, full = keys.shape[2], self.length // self.size
        count, room = -(-length // self.size), self.room
        if room is None or not room.takes(keys, self.length, count):
            room = self.moved(keys, full, count + max(SPARE, count // SHARE))
        begun = keys.detach()[:, :, full * self.size :]
        if begun.shape[2] <= self.size:
            torch.aminmax(begun, dim=2, out=(room.low[:, :, full], room.high[:, :, full]))
        else:
            room.low[:, :, full:count], room.high[:, :, full:count] = lowest(begun, self.size), highest(begun, self.size)
        room.keys = length
        return replace(self, length=length, room=room)

    def moved(self, keys: Tensor, full: int, places: int) -> PageRoom:
        """A room of so many places, with the first `full` pages."""
        made = [keys.new_empty((*keys.shape[:2], places, keys.shape[3])) for _ in range(2)]
        if full and self.room is not None:
            for new, old in zip(made, (self.room.low, self.room.high), strict=True):
                new[:, :, :full] = old[:, :, :full]
        return PageRoom(made[0], made[1], self.length)

    def cut(self, keys: Tensor) -> Bounds:
        """Of fewer keys [B, G, L, D], the first of those that were counted."""
        full = keys.shape[2] // self.size
        whole = full * self.size
        begun = replace(self, length=whole).mapped(lambda x: x[:, :, :full])  # without places for others
        return begun.grown(keys) if keys.shape[2] > whole else begun

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Bounds:
        """The same change of sequences to both bounds, in a room of their own."""
        if self.room is None:
            return self
        low, high = (change(x) for x in (self.room.low, self.room.high))
        return replace(self, room=PageRoom(low, high, self.length))
