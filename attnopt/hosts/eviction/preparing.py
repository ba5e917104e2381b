"""The cache of a call of a live model, which is kept in another form than the model would keep it.

    prepared(model, form, args, {"input_ids": …})   ->   {"input_ids": …, "past_key_values": an empty cache in that form}

A cache that is given is changed in place, in every call; one that cannot be is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin

from attnopt.errors import AttnoptError
from attnopt.hosts.eviction.block_layer import BlockLayer
from attnopt.hosts.eviction.layer import EvictingLayer

# Changes a cache. Whether one new token gets its cache as it is stored; the mask [B, L] of the call, or None.
Form = Callable[[Cache, bool, Any], None]


def prepared(model: nn.Module, form: Form, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a call of a model whose cache, the one that it is given or would make, is in a form."""
    given = kwargs if not args else inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    cache, uses = given.get("past_key_values"), given.get("use_cache")
    if cache is None:
        config: Any = model.config
        if not (config.use_cache if uses is None else uses):
            return kwargs
        cache = DynamicCache(config=model.config)
        kwargs = {**kwargs, "past_key_values": cache}
    form(cache, not compiled(model), given.get("attention_mask"))
    return kwargs


def compiled(model: Any) -> bool:
    """Whether torch.compile makes graphs of the model's calls: they are of numbers."""
    return torch.compiler.is_compiling() or hasattr(model.forward, "_torchdynamo_orig_callable")


def empty(model: Any, form: Form) -> Cache:
    """An empty cache in a form, as the model would make one."""
    cache = DynamicCache(config=model.config)
    form(cache, False, None)
    return cache


def keeps_its_own(layer: Any) -> bool:
    """Whether a layer holds blocks of tokens already, forgets, or keeps a window or a state."""
    window = getattr(layer, "is_sliding", False) and not hasattr(layer, "max_cache_len")
    return bool(window or isinstance(layer, (BlockLayer, EvictingLayer, LinearAttentionCacheLayerMixin)))


def unmoved(cache: Cache, attribute: str, how: str) -> None:
    """Raises AttnoptError for a cache that is moved between devices."""
    if getattr(cache, "offloading", False):
        raise cannot("a cache that is moved between devices", attribute, how)


def cannot(what: str, attribute: str, how: str) -> AttnoptError:
    """attribute: of the model, that asks for the form. how: "in codes, …" """
    return AttnoptError(
        f"this model keeps its cache {how}, and {what} cannot hold them",
        next_move=f"Leave cache_implementation= and past_key_values= out, or set model.{attribute} = None.",
    )
