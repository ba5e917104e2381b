"""Long live caches that grow in place: a token that comes moves nothing, where transformers copies all that is there.

    DynamicLayer of 4,096 tokens   ->   WholeLayer of the same, with spare places behind       one more token: written into the next

Keys and values are the same numbers. A cache that is short, or of another kind, stays as it is: copying few tokens takes less than
writing into a room.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from attnopt.hosts.eviction.room import spare
from attnopt.hosts.eviction.whole_layer import WholeLayer

LONG = 2**19  # bytes of the keys of a layer from which on it has a room


def in_rooms(cache: Any) -> None:
    """Let the long layers of a cache that keep all their tokens have rooms from now on; nothing where it is no such cache."""
    if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False) or torch.compiler.is_compiling():
        return
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized and layer.keys.numel() and layer.keys.nbytes >= LONG:
            cache.layers[i] = made = WholeLayer()
            made.take(layer.keys, layer.values, spare(layer.get_seq_length()))
