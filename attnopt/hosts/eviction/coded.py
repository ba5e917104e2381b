"""A live cache in codes: each token is rounded once, when it comes, and read as its codes stand for it.

    DynamicCache of DynamicLayer   ->   the same cache of CodedLayer       k, v [B, G, n, D] -> codes, scales, zeros     (`Stored`)

What attention reads is what `cache(k=int8, v=int8)` of a spec means, to the last bit, for prompts and for new tokens alike. A new token
gets its keys and values as they are stored (`Unread`): a kernel of ours reads the codes, anything else the numbers. Beams, batches and
rolling back work as on any cache of transformers. Layers that keep something else than all their tokens keep it.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from attnopt.errors import AttnoptError
from attnopt.hosts.eviction.block_layer import BlockLayer, refused
from attnopt.hosts.eviction.ends import Ends
from attnopt.hosts.eviction.live_forms import empty_side, keeps_blocks, keeps_ends, starts_of
from attnopt.hosts.eviction.room import spare
from attnopt.hosts.eviction.stored import Stored
from attnopt.hosts.eviction.stored_layer import StoredLayer
from attnopt.hosts.eviction.unread import Unread
from attnopt.hosts.module.interface import lead
from attnopt.ir.by_layer import CacheForm, of_layer
from attnopt.ir.clause import Clause


class CodedLayer(StoredLayer):
    """Keys and values of all tokens of one layer as a clause keeps them, which `live_forms.live_form` made.

    starts: the places of the first tokens of rows that are padded on their left, [B], where what is exact hangs on them.
    """

    is_croppable = True
    hands_codes = False  # whether one new token gets its cache unread

    def __init__(self, clause: Clause, starts: Tensor | None = None) -> None:
        self.clause, self.starts = clause, starts
        self.k, self.v = empty_side(clause, "k", starts), empty_side(clause, "v", starts)
        super().__init__()

    @property
    def bytes(self) -> int:
        return self.k.bytes + self.v.bytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.shape[1] == key_states.shape[3] == 1:  # no key: a layer without attention counts its tokens by it
            self.k, self.v = Stored(None, "k"), Stored(None, "v")
        elif self.starts is not None:
            self.k, self.v = (empty_side(self.clause, side, self.starts) for side in "kv")
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        one = key_states.shape[2] == 1 and self.k.packed is not None
        places = spare(self.k.length) if one else 0
        self.k, self.v = self.k.grown(key_states, places), self.v.grown(value_states, places)
        hands = one and self.hands_codes and self.starts is None and not key_states.requires_grad
        if not hands or self.k.clause is None or torch.compiler.is_compiling():
            return self.k.read(), self.v.read()
        return Unread(self.k, key_states.shape[3]), Unread(self.v, value_states.shape[3])

    def take(self, key_states: Tensor, value_states: Tensor) -> None:
        """Tokens of another cache."""
        self.update(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.k.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        self.k, self.v = empty_side(self.clause, "k"), empty_side(self.clause, "v")
        self.is_initialized, self.starts = False, None

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers asks for it: so many tokens less, as a number below 0."""
        left = self.get_seq_length() - abs(tokens_to_remove)
        self.k, self.v = self.k.cut(left), self.v.cut(left)

    def map(self, change: Any) -> None:
        self.k, self.v = self.k.mapped(change), self.v.mapped(change)


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
    if getattr(cache, "offloading", False):
        raise cannot("a cache that is moved between devices")
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = made = layer_of(cache, clause, starts, i)
            if layer.get_seq_length():
                made.take(layer.keys, layer.values)
        elif isinstance(layer, CodedLayer):
            layer.hands_codes = hands_codes
            layer.starts = layer.starts if layer.is_initialized else starts
        elif not keeps_its_own(layer):
            raise cannot(f"a {type(cache).__name__} of {type(layer).__name__}")


def keeps_its_own(layer: Any) -> bool:
    """Whether a layer holds codes already, forgets, or keeps a window or a state."""
    window = getattr(layer, "is_sliding", False) and not hasattr(layer, "max_cache_len")
    coded = isinstance(layer, BlockLayer) or isinstance(getattr(layer, "k", None), (Stored, Ends))
    return bool(coded or window or isinstance(layer, LinearAttentionCacheLayerMixin))


def cannot(what: str) -> AttnoptError:
    return AttnoptError(
        f"this model keeps its cache in codes, and {what} cannot hold them",
        next_move="Leave cache_implementation= and past_key_values= out, or set model.cache_codes = None.",
    )


def prepared(model: nn.Module, clause: CacheForm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a call of a model whose cache, the one that it is given or would make, is in codes."""
    given = kwargs if not args else inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    cache, uses = given.get("past_key_values"), given.get("use_cache")
    if cache is None:
        config: Any = model.config
        if not (config.use_cache if uses is None else uses):
            return kwargs
        cache = fresh(model, clause)
        kwargs = {**kwargs, "past_key_values": cache}
    if keeps_blocks(clause) and compiled(model):
        raise refused("torch.compile does not follow it")
    at_start = keeps_ends(clause) and (not cache.get_seq_length() or any(type(x) is DynamicLayer for x in cache.layers))
    in_codes(cache, clause, not compiled(model), starts_of(given.get("attention_mask")) if at_start else None)
    return kwargs


def compiled(model: Any) -> bool:
    """Whether torch.compile makes graphs of the model's calls: they are of numbers."""
    return torch.compiler.is_compiling() or hasattr(model.forward, "_torchdynamo_orig_callable")


def fresh(model: Any, clause: CacheForm, starts: Tensor | None = None) -> Cache:
    """An empty cache in codes, as the model would make one. starts: of rows that are padded on their left."""
    if keeps_blocks(clause):
        lead(model)  # they learn from its attention
    cache = DynamicCache(config=model.config)
    in_codes(cache, clause, starts=starts)
    return cache


def bytes_per_token(cache: Cache) -> float:
    """What all layers hold, codes with their scales, for each token of each sequence that was seen."""
    total, tokens = 0, 0
    for layer in cache.layers:
        sides = [x for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(x, Tensor)]
        total += getattr(layer, "bytes", sum(x.nbytes for x in sides))
        tokens = max(tokens, len(sides[0]) * int(layer.get_seq_length()) if sides else 0)
    return total / max(1, tokens)
