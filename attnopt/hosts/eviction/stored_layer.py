"""What layers of a live cache share whose keys and values are `Stored`: they come by `update`, and sequences of a batch move together.

reorder_cache([1, 1, 0]), batch_repeat_interleave(2), …   ->   map(the same change of rows to all that the layer holds)
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from attnopt.hosts.eviction.ends import Ends
from attnopt.hosts.eviction.stored import Stored


class StoredLayer(CacheLayerMixin):
    """k, v: what is held. `map` is the layer's own."""

    is_compileable = False
    is_sliding = False
    k: Stored | Ends
    v: Stored | Ends

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """The same change of sequences to all that is held."""
        raise NotImplementedError

    def read(self, side: str) -> Tensor | None:
        """All that is held of one side, [B, G, L, D]; None before the first token."""
        held = self.k if side == "k" else self.v
        return None if held.packed is None else held.read()

    @property
    def keys(self) -> Tensor | None:
        return self.read("k")

    @keys.setter
    def keys(self, given: Tensor | None) -> None:
        if given is not None:
            self.put("k", given)

    @property
    def values(self) -> Tensor | None:
        return self.read("v")

    @values.setter
    def values(self, given: Tensor | None) -> None:
        if given is not None:
            self.put("v", given)

    def put(self, side: str, given: Tensor) -> None:
        """Other keys or values for all that is held. Raises AttributeError where these are more than numbers."""
        raise AttributeError(f"{'keys' if side == 'k' else 'values'} of this cache come by update")

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map(lambda x: x.index_select(0, indices.to(x.device)))
