"""One layer of a live cache that forgets: tokens come by `update`, some leave by `keep_only`, positions go on as if none had left.

    update(k [B, G, n, D], v) -> all that is held and what came         get_seq_length() -> tokens seen, not tokens held

`get_mask_sizes` says that nothing has left, so that transformers makes its mask for all that was seen; `visible` then gathers the
columns of what is held, per head. Where heads or sequences hold different numbers, rows are filled up to the longest and the fill is
masked: memory is that of the longest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnopt.errors import AttnoptError
from attnopt.hosts.eviction.room import spare
from attnopt.hosts.eviction.stored import Stored
from attnopt.hosts.eviction.stored_layer import StoredLayer
from attnopt.hosts.eviction.unread import Unread
from attnopt.ir.clause import Clause
from attnopt.ir.eviction import FAR


class EvictingLayer(StoredLayer):
    """Keys and values of what is held, their places [B, G, L], and the place of each sequence's first token [B]."""

    is_croppable = False
    k: Stored
    v: Stored

    def __init__(self, index: int, clause: Clause | None = None) -> None:
        self.index, self.clause = index, clause
        self.clear()
        super().__init__()

    def clear(self) -> None:
        self.k, self.v = Stored(self.clause, "k"), Stored(self.clause, "v")
        self.places: Tensor | None = None
        self.start: Tensor | None = None  # until the mask of the first call says it
        self.seen = 0
        self.fresh = 0  # tokens since the last eviction
        self.ragged = False  # whether some places are FAR
        self.whole = True  # whether every token seen is held
        self.q: Tensor | None = None
        self.plain: Tensor | None = None
        self.admitted = False  # by the session that is active, for one update
        self.width = 0  # of a key
        self.exact_bytes = 0  # of one token as the model has it

    @property
    def bytes(self) -> int:
        """Of keys and values with their scales, and of places."""
        places = 0 if self.places is None else self.places.numel() * self.places.element_size()
        return self.k.bytes + self.v.bytes + places

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.admitted:
            raise AttnoptError(
                "tokens may have left this cache, and it is used outside of attnopt.cache(…)",
                where=f"layer {self.index}",
                next_move="Go on inside the `with` block, or start with a new cache.",
            )
        self.admitted = False
        one = key_states.shape[2] == 1 and self.k.packed is not None
        self.take(key_states, value_states)
        if not one or self.clause is None or key_states.requires_grad or torch.compiler.is_compiling():
            return self.k.read(), self.v.read()
        return Unread(self.k, key_states.shape[3]), Unread(self.v, value_states.shape[3])

    def take(self, key_states: Tensor, value_states: Tensor) -> None:
        """Tokens behind those that were seen."""
        self.lazy_initialization(key_states, value_states)
        batch, heads, count, width = key_states.shape
        new = torch.arange(self.seen, self.seen + count, device=key_states.device, dtype=torch.int32).expand(batch, heads, count)
        self.places = new if self.places is None else torch.cat([self.places, new], 2)
        places = spare(self.k.length) if count == 1 and self.k.packed is not None else 0
        self.k, self.v = self.k.grown(key_states, places), self.v.grown(value_states, places)
        self.width = width
        self.exact_bytes = heads * (width + value_states.shape[3]) * key_states.element_size()
        self.seen += count
        self.fresh += count

    def keep_only(self, index: Tensor, counts: Tensor) -> None:
        """index [B, G, C] into what is held, in the order of places; counts [B, G, C] bool: which of them are there."""
        assert self.places is not None
        self.fresh = 0
        if bool(counts.all()) and index.shape[2] == self.places.shape[2]:
            return
        self.k, self.v = self.k.taken(index), self.v.taken(index)
        self.places = self.places.gather(2, index).masked_fill(~counts, FAR)
        self.ragged, self.whole = not bool(counts.all()), False

    def visible(self, mask: Any, q: Tensor) -> Any:
        """The mask of what is held: [B, H, Q, L] from one for all that was seen, [B, 1 or H, Q, seen]; None where nothing is hidden."""
        assert self.places is not None
        if self.whole or (mask is None and not self.ragged):
            return mask
        repeats = q.shape[1] // self.places.shape[1]
        places = self.places.repeat_interleave(repeats, 1)[:, :, None].expand(-1, -1, q.shape[2], -1)
        there = places != FAR
        if mask is None:
            return torch.zeros_like(there, dtype=q.dtype).masked_fill(~there, torch.finfo(q.dtype).min)
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise AttnoptError(
                "a mask of another form than [batch, heads, queries, keys] cannot be narrowed to what heads hold",
                where=f"layer {self.index}",
                next_move='Load the model with attn_implementation="sdpa" or "eager".',
            )
        seen = mask.expand(len(places), places.shape[1], -1, -1).gather(3, places.clamp(max=self.seen - 1).long())
        return seen & there if seen.dtype == torch.bool else seen.masked_fill(~there, torch.finfo(seen.dtype).min)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        self.clear()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        raise AttnoptError(
            "tokens that were evicted cannot be taken back",
            where=f"layer {self.index}",
            next_move="Generate without an assistant model, or outside of attnopt.cache(…).",
        )

    def map(self, change: Any) -> None:
        """The same change of sequences to all that is held."""
        if self.places is None:
            return
        self.k, self.v = self.k.mapped(change), self.v.mapped(change)
        self.places = change(self.places)
        self.start = None if self.start is None else change(self.start)
        self.q = None if self.q is None else change(self.q)
        self.plain = None if self.plain is None else change(self.plain)
