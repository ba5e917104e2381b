"""A live cache in codes: each token is rounded once, when it comes, and read as its codes stand for it.

    DynamicCache of DynamicLayer   ->   the same cache of CodedLayer       k, v [B, G, n, D] -> codes, scales, zeros     (`Stored`)

What attention reads is what `cache(k=int8, v=int8)` of a spec means, to the last bit, for prompts and for new tokens alike. A new token
gets its keys and values as they are stored (`Unread`): a kernel of ours reads the codes, anything else the numbers. Beams, batches and
rolling back work as on any cache of transformers. Layers that keep something else than all their tokens keep it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from attnopt.hosts.eviction.block_layer import BlockLayer, refused
from attnopt.hosts.eviction.live_forms import empty_side, keeps_blocks, keeps_ends, starts_of
from attnopt.hosts.eviction.preparing import Form, cannot, keeps_its_own, unmoved
from attnopt.hosts.eviction.unread import Unread
from attnopt.hosts.eviction.whole_layer import WholeLayer
from attnopt.hosts.module.interface import lead
from attnopt.ir.by_layer import CacheForm, of_layer
from attnopt.ir.clause import Clause

SAID = "cache_codes", "in codes"


class CodedLayer(WholeLayer):
    """Keys and values of all tokens of one layer as a clause keeps them, which `live_forms.live_form` made.

    starts: the places of the first tokens of rows that are padded on their left, [B], where what is exact hangs on them.
    """

    hands_codes = False  # whether one new token gets its cache unread

    def __init__(self, clause: Clause, starts: Tensor | None = None) -> None:
        self.starts = starts
        super().__init__(clause)

    def side(self, name: str) -> Any:
        assert self.clause is not None
        return empty_side(self.clause, name, self.starts)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if self.starts is not None:  # they may have been told after it was made
            self.k, self.v = self.side("k"), self.side("v")
        super().lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        one = self.take(key_states, value_states)
        hands = one and self.hands_codes and self.starts is None and not key_states.requires_grad
        if not hands or self.k.clause is None or torch.compiler.is_compiling():
            return self.k.read(), self.v.read()
        return Unread(self.k, key_states.shape[3]), Unread(self.v, value_states.shape[3])

    def reset(self) -> None:
        self.starts = None
        super().reset()


def layer_of(cache: Cache, form: CacheForm, starts: Tensor | None, index: int | None = None) -> CodedLayer | BlockLayer:
    """The next layer of a cache, or one in the place of another."""
    clause = of_layer(form, len(cache.layers) if index is None else index)
    return BlockLayer(clause) if keeps_blocks(clause) else CodedLayer(clause, starts)


def in_codes(cache: Cache, clause: CacheForm, hands_codes: bool = False, starts: Tensor | None = None) -> None:
    """Let the layers of a cache that keep all their tokens keep them in codes from now on; what they hold is rounded.

    hands_codes: who asks for them in the next call may get them as they are stored. starts: of rows that are padded on their left.

    Raises AttnoptError for caches that cannot: of fixed size, quantised by transformers, moved between devices.
    """
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = functools.partial(layer_of, cache, clause, starts)
    unmoved(cache, *SAID)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, CodedLayer):
            layer.hands_codes = hands_codes
            layer.starts = layer.starts if layer.is_initialized else starts
        elif type(layer) is DynamicLayer or isinstance(layer, WholeLayer):
            cache.layers[i] = made = layer_of(cache, clause, starts, i)
            if layer.get_seq_length():
                made.take(layer.keys, layer.values)
        elif not keeps_its_own(layer):
            raise cannot(f"a {type(cache).__name__} of {type(layer).__name__}", *SAID)


def as_codes(form: CacheForm) -> Form:
    """The form of a cache in codes, for `preparing.prepared`."""

    def made(cache: Cache, hands: bool, mask: Any) -> None:
        if keeps_blocks(form) and not hands:
            raise refused("torch.compile does not follow it")
        at_start = keeps_ends(form) and (not cache.get_seq_length() or any(type(x) is DynamicLayer for x in cache.layers))
        in_codes(cache, form, hands, starts_of(mask) if at_start else None)

    return made


def fresh(model: Any, form: CacheForm, starts: Tensor | None = None) -> Cache:
    """An empty cache in codes, as the model would make one. starts: of rows that are padded on their left."""
    if keeps_blocks(form):
        lead(model)  # they learn from its attention
    cache = DynamicCache(config=model.config)
    in_codes(cache, form, starts=starts)
    return cache


def bytes_per_token(cache: Cache) -> float:
    """What all layers hold, codes with their scales, for each token of each sequence that was seen."""
    total, tokens = 0, 0
    for layer in cache.layers:
        sides = [x for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(x, Tensor)]
        total += getattr(layer, "bytes", sum(x.nbytes for x in sides))
        tokens = max(tokens, len(sides[0]) * int(layer.get_seq_length()) if sides else 0)
    return total / max(1, tokens)
