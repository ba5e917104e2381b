"""A live cache whose layers know the bounds of their pages: one new query reads the few pages that it chooses by them.

    DynamicCache of DynamicLayer   ->   the same cache of PagedLayer       update(k [B, G, 1, D], v) -> keys with their bounds, values

Bounds are brought up to date when a query chooses by them: a cache that is read whole costs none. Keys and values stay as they come, in
rooms with spare places: the kernel reads pages where they lie. Whoever knows nothing of pages gets keys as from any cache (`InPages` is
read like a tensor). Layers that choose no pages have the rooms and no bounds.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from attnopt.errors import InputMismatch
from attnopt.hosts.eviction.block_layer import BlockLayer
from attnopt.hosts.eviction.bounds import Bounds
from attnopt.hosts.eviction.coded import CodedLayer
from attnopt.hosts.eviction.in_pages import InPages
from attnopt.hosts.eviction.preparing import cannot, empty, keeps_its_own, unmoved
from attnopt.hosts.eviction.stored import Stored
from attnopt.hosts.eviction.whole_layer import WholeLayer
from attnopt.ir.clause import Clause
from attnopt.ir.spec import as_spec

SAID = "cache_pages", "with bounds of its pages"


class Choosing(NamedTuple):
    """size: keys of a page. least: keys of a cache from which on a query chooses; a shorter one is read like any other."""

    size: int
    least: int = 0


class PagedLayer(WholeLayer):
    """choosing: None where the layer chooses no pages. known: bounds as they were when they were asked for last."""

    hands_pages = False  # whether one new token gets keys with their bounds

    def __init__(self, choosing: Choosing | None) -> None:
        super().__init__()
        self.choosing = choosing
        self.known = self.none()

    def none(self) -> Bounds | None:
        """Bounds of no pages."""
        return None if self.choosing is None else Bounds(self.choosing.size)

    @property
    def bounds(self) -> Bounds | None:
        """Of all keys that are held."""
        if self.known is not None and self.known.length < self.k.length:
            self.known = self.known.grown(self.k.read())
        return self.known

    @property
    def bytes(self) -> int:
        return super().bytes + (0 if self.known is None else self.known.bytes)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if key_states.shape[1] == key_states.shape[3] == 1:
            self.known = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        one = self.take(key_states, value_states)
        keys, values = self.k.read(), self.v.read()
        chooses = self.choosing is not None and self.known is not None and one and self.hands_pages
        if not chooses or key_states.requires_grad or torch.compiler.is_compiling():
            return keys, values
        assert isinstance(self.k, Stored) and self.choosing is not None
        if self.k.length < self.choosing.least:
            return keys, values
        return InPages.of(self.k, self.choosing.size, self.up_to_date), values

    def up_to_date(self) -> Bounds:
        assert self.bounds is not None
        return self.bounds

    def reset(self) -> None:
        super().reset()
        self.known = self.none()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.known is not None and self.known.length > self.k.length:
            self.known = self.known.cut(self.k.read())

    def map(self, change: Any) -> None:
        super().map(change)
        self.known = None if self.known is None else self.known.mapped(change)


def in_pages(cache: Cache, layers: Mapping[int, Choosing], hands_pages: bool = False) -> None:
    """Let the layers of a cache that keep all their tokens keep bounds of their pages from now on.

    layers: those that choose pages, by their numbers. hands_pages: one new token may get them in the next call.

    Raises AttnoptError for caches that cannot: of fixed size, in codes, moved between devices.
    """
    unmoved(cache, *SAID)
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layers += [PagedLayer(layers.get(i)) for i in range(len(cache.layers), 1 + max(layers, default=-1))]
        cache.layer_class_to_replicate = functools.partial(PagedLayer, None)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, PagedLayer) and layer.choosing == layers.get(i):
            layer.hands_pages = hands_pages
        elif type(layer) is DynamicLayer or isinstance(layer, PagedLayer):
            cache.layers[i] = made = PagedLayer(layers.get(i))
            made.hands_pages = hands_pages
            if layer.get_seq_length():
                made.update(layer.keys, layer.values)
        elif isinstance(layer, (CodedLayer, BlockLayer)) or not keeps_its_own(layer):
            raise cannot(f"a {type(cache).__name__} of {type(layer).__name__}", *SAID)


def fresh_pages(model: Any, layers: Mapping[int, Choosing]) -> Cache:
    """An empty cache with bounds of its pages, as the model would make one."""
    return empty(model, lambda cache, hands, mask: in_pages(cache, layers, hands))


@functools.lru_cache(maxsize=64)
def page_choice(words: str | None) -> Clause | None:
    """ "pages(16, 64, recent=1)" as a clause. Raises InputMismatch for what no kernel of pages computes."""
    if words is None:
        return None
    clause = as_spec(f"softmax {words}").selection
    if clause is None or clause.name != "pages" or not clause.count("recent") or clause.operand("low") or clause.operand("high"):
        raise InputMismatch(
            f"'{words}' is no choice of pages of a live cache",
            next_move='Write "pages(16, 64, recent=1)": 64 pages of 16 keys, the newest among them.',
        )
    return clause
