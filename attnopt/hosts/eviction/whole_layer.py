"""A layer of a live cache that keeps all its tokens in a room with spare places, as they come or in codes.

    update(k [B, G, n, D], v)   ->   the same rows behind what is there; nothing moves until the spare places are used up

How they are read is the layer's own. What came last can be taken back.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnopt.hosts.eviction.room import spare
from attnopt.hosts.eviction.stored import Stored
from attnopt.hosts.eviction.stored_layer import StoredLayer
from attnopt.ir.clause import Clause


class WholeLayer(StoredLayer):
    """clause: how rows are kept, None as they come."""

    is_croppable = True

    def __init__(self, clause: Clause | None = None) -> None:
        self.clause = clause
        self.k, self.v = self.side("k"), self.side("v")
        super().__init__()

    def side(self, name: str) -> Any:
        """Keys or values before the first token."""
        return Stored(self.clause, name)

    @property
    def bytes(self) -> int:
        return self.k.bytes + self.v.bytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.shape[1] == key_states.shape[3] == 1:  # no key: a layer without attention counts its tokens by it
            self.k, self.v = Stored(None, "k"), Stored(None, "v")
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.take(key_states, value_states)
        return self.k.read(), self.v.read()

    def put(self, side: str, given: Tensor) -> None:
        if self.clause is not None:
            super().put(side, given)
        self.is_initialized = True
        setattr(self, side, self.side(side).grown(given))

    def take(self, key_states: Tensor, value_states: Tensor, places: int = 0) -> bool:
        """Tokens behind those that are held; whether it is one, and others were there. places: to spare behind them, at least."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        one = key_states.shape[2] == 1 and self.k.packed is not None
        places = max(places, spare(self.k.length) if one else 0)
        self.k, self.v = self.k.grown(key_states, places), self.v.grown(value_states, places)
        return one

    def get_seq_length(self) -> int:
        return self.k.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        self.k, self.v = self.side("k"), self.side("v")
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers asks for it: so many tokens less, as a number below 0."""
        left = self.get_seq_length() - abs(tokens_to_remove)
        self.k, self.v = self.k.cut(left), self.v.cut(left)

    def map(self, change: Any) -> None:
        self.k, self.v = self.k.mapped(change), self.v.mapped(change)
