"""One layer of a live cache in blocks of tokens: its attention is computed where its tokens are, because the weights say which are salient.

    k, v = layer.update(k [B, G, n, D], v)  ->  Unread(Awaited)          k.stored.attend(q, mask, scale)  ->  o, and the tokens are held

What `update` gives has the shape of keys and values, and is no numbers: the attention function of live models takes it as it is, and
anything else that reads it is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import AttnoptError
from attnopt.hosts.eviction.block_state import BlockState, Run
from attnopt.hosts.eviction.stored import Stored
from attnopt.hosts.eviction.stored_layer import StoredLayer
from attnopt.hosts.eviction.uncompiled import uncompiled
from attnopt.hosts.eviction.unread import Unread
from attnopt.ir.clause import Clause
from attnopt.ir.site import Refusal
from attnopt.ir.token_blocks import token_blocks

INSTEAD = 'Set model.cache_codes = "int4", or None.'


@dataclass(eq=False)
class Awaited:
    """Tokens k, v [B, G, n, D] that came to a layer, and wait for their queries."""

    layer: BlockLayer
    k: Tensor
    v: Tensor

    @property
    def clause(self) -> Clause:
        return self.layer.clause

    @property
    def rows(self) -> tuple[int, int, int]:
        batch, heads, count, _ = self.k.shape
        return (batch, heads, self.layer.state.length + count)

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    @property
    def device(self) -> torch.device:
        return self.k.device

    def read(self) -> Tensor:
        raise refused("something else than the attention of live models reads it")

    def part(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        return change(self.read())

    @uncompiled
    def attend(self, q: Tensor, mask: Any, scale: float, run: Run | None = None) -> Tensor:
        """q [B, H, n, D] -> o [B, H, n, E]. Raises AttnoptError for a mask that hides more than what comes later."""
        if mask is not None and not sees_all(mask, q.shape[2], self.rows[2]):
            raise refused("rows are padded, or a mask hides some of their tokens")
        self.layer.awaited = None
        return self.layer.state.attend(q, self.k, self.v, scale, run)


class BlockLayer(StoredLayer):
    """Keys and values of all tokens of one layer, as `token_blocks` of the clause keeps them."""

    is_croppable = False

    def __init__(self, clause: Clause) -> None:
        self.clause = clause
        self.state = self.empty()
        self.awaited: Awaited | None = None
        self.counted = Stored(None, "k")  # of a layer without attention: a number for each token
        super().__init__()

    def empty(self) -> BlockState:
        form = token_blocks(self.clause)
        assert not isinstance(form, Refusal)
        return BlockState(form)

    @property
    def bytes(self) -> int:
        return self.state.bytes + 2 * self.counted.bytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.lazy_initialization(key_states, value_states)
        if key_states.shape[1] == key_states.shape[3] == 1:
            self.counted = self.counted.grown(key_states)
            return self.counted.read(), self.counted.read()
        if self.awaited is not None:
            raise refused("its attention does not go through transformers' AttentionInterface")
        form = self.state.form
        if why := form.refusal(key_states.shape[3]) or form.refusal(value_states.shape[3]):
            raise refused(why)
        if key_states.shape[1] != value_states.shape[1]:
            raise refused("its keys and values have other numbers of heads")
        if key_states.requires_grad:
            raise refused("gradients flow through it")
        self.awaited = made = Awaited(self, key_states, value_states)
        return Unread(made, key_states.shape[3]), Unread(made, value_states.shape[3])

    def take(self, key_states: Tensor, value_states: Tensor) -> None:
        """Tokens whose attention nobody saw."""
        self.lazy_initialization(key_states, value_states)
        self.state.take(key_states, value_states)

    def read(self, side: str) -> Tensor | None:
        """As of the layers that hold tokens in their order; here they are in the order of the sets, those that wait last."""
        state = self.state
        if not state.length:
            return None if self.counted.packed is None else self.counted.read()
        waiting = (state.k if side == "k" else state.v).read()
        return torch.cat([state.numbers(waiting.dtype)[side == "v"], waiting], 2)

    def get_seq_length(self) -> int:
        return self.state.length or self.counted.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        self.state, self.awaited, self.counted = self.empty(), None, Stored(None, "k")
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Raises AttnoptError: what tokens were given by queries that go cannot be taken back."""
        if tokens_to_remove:
            raise refused("tokens were taken back from it: assisted generation cannot use it")

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state.map(change)
        self.counted = self.counted.mapped(change)


def sees_all(mask: Tensor, queries: int, keys: int) -> bool:
    """Whether a mask hides nothing but what comes later."""
    so_far = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    return mask.dtype == torch.bool and mask.shape[2:] == so_far.shape and bool((mask == so_far).all())


def refused(why: str) -> AttnoptError:
    return AttnoptError(f"a cache in blocks learns from every attention which tokens are salient, and {why}", next_move=INSTEAD)
