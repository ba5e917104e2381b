"""One attention function and one mask function for all live models, known to transformers by the name "attnopt".

    config._attn_implementation = "attnopt"      layer(x)  ->  attnopt_attention(layer, q, k, v, mask)  ->  the layer's own kernel

The function looks up what the layer holds (`LayerAttention`). What no kernel computes, a mask that transformers has made, dropout, a
packed batch, goes the way that the model had before. A mask is left out where positions alone say what is seen, of windows too:
transformers makes one for each prompt that is longer than a window. The mask of a plan holds on every way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.hosts.eviction.block_layer import Awaited, refused
from attnopt.hosts.eviction.in_pages import InPages
from attnopt.hosts.eviction.unread import Unread
from attnopt.hosts.module.layer_attention import STRANGE, AttentionCall, LayerAttention
from attnopt.hosts.module.narrowing import joined
from attnopt.hosts.module.padding import by_rows, starts

NAME = "attnopt"
HELD = "attnopt_held"  # of an attention module: its LayerAttention
WINDOWS = "attnopt_windows"  # of a configuration: every layer with a window does without a mask
BEFORE = "attnopt_before"  # of a configuration: the implementation that the model had
CALLS: list[dict[nn.Module, AttentionCall]] = []  # where calls are noted, while some are


def register() -> None:
    """Make both functions known to transformers; again and again does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attnopt_attention)
    AttentionMaskInterface.register(NAME, attnopt_mask)


def lead(model: Any, windows: bool | None = None) -> None:
    """Let all attentions of a model go through the function below. windows: whether layers with one do without a mask; None as before."""
    register()
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        if config._attn_implementation != NAME:
            setattr(config, BEFORE, config._attn_implementation)
        if windows is not None or not hasattr(config, WINDOWS):
            setattr(config, WINDOWS, bool(windows))
        config._attn_implementation_internal = NAME


def attnopt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E] -> ([B, Q, H, E], weights or None), as transformers' own functions."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.shape[-1] != key.shape[-1]:  # keys of narrower heads, see `widths`: the other channels of a query are zero
        query = query[..., : key.shape[-1]]
    if CALLS:
        CALLS[-1][module] = described(query, key, value, factor, causal, kwargs)
    held: LayerAttention | None = getattr(module, HELD, None)
    plain, queries = type(key) is Tensor, query.shape[2]  # a step on a short cache feels each question that is asked here
    if not plain and isinstance(key, Unread) and isinstance(key.stored, Awaited):
        return learned(key.stored, held, query, attention_mask, factor, dropout, causal, kwargs), None
    if attention_mask is None and causal and 1 < queries < key.shape[2]:  # a cache of fixed size that was empty
        key, value = key[:, :, :queries], value[:, :, :queries]
    if held is not None and attention_mask is None and dropout == 0.0:
        if not plain and isinstance(key, Unread) and isinstance(value, Unread):
            run = held.of_codes(query, key.stored.clause, causal, kwargs)
            if run is not None:
                return run(query, key.stored.packed, value.stored.packed).transpose(1, 2).contiguous(), None
        if not plain and isinstance(key, InPages):
            run = held.of_pages(query, key.shape[2], key.size, causal, kwargs)
            if run is not None:
                state = key.counted().state
                return run(query, key.numbers(), value, state.low, state.high).transpose(1, 2).contiguous(), None
        kernel = held.kernel(query, key, causal, kwargs)
        if kernel is not None:
            if not plain:
                key, value = (x.numbers() if isinstance(x, Unread) else x for x in (key, value))
            return kernel(query, key, value)[0].transpose(1, 2).contiguous(), None
        if queries == 1 and plain and held.mask is None and sdpa_alone(module, held, query, causal, kwargs):
            shared = query.shape[1] != key.shape[1]
            o = nn.functional.scaled_dot_product_attention(query, key, value, scale=factor, enable_gqa=shared)
            return o.transpose(1, 2).contiguous(), None
    if held is not None and attention_mask is not None and held.changes_prompts and dropout == 0.0 and queries > 1:
        made = unpadded(held, query, key, value, attention_mask, causal, kwargs)
        if made is not None:
            return made.transpose(1, 2).contiguous(), None
    if held is not None and held.mask is not None:
        if attention_mask is None and queries == 1 and held.reach is not None:
            key, value = (x.cut(held.reach.cut) if isinstance(x, Unread) else held.reach.cut(x) for x in (key, value))
        else:
            attention_mask = joined(held.mask, attention_mask, query, key)
    elif attention_mask is None and causal and queries > 1:
        attention_mask = windowed(queries, kwargs.get("sliding_window"), query.device)
    return own_way(module, query, key, value, attention_mask, scaling=factor, dropout=dropout, is_causal=causal, **kwargs)


def sdpa_alone(module: nn.Module, held: LayerAttention, query: Tensor, causal: bool, kwargs: dict[str, Any]) -> bool:
    """Whether one query on the keys that it sees is torch's sdpa and nothing else, which need not be found out on the way there."""
    own = implementation_before(getattr(module, "config", None)) == "sdpa" and kwargs.get("softcap") is None
    return own and held.takes(query, causal, kwargs)


def learned(
    tokens: Awaited, held: LayerAttention | None, q: Tensor, mask: Any, factor: float, dropout: float, causal: bool, kwargs: Any
) -> Tensor:
    """Of a layer whose cache learns from it. Raises AttnoptError for what is no softmax of scaled products that sees all tokens so far."""
    odd = [name for name in (*STRANGE, "softcap", "sliding_window") if kwargs.get(name) is not None]
    if odd or dropout or not causal:
        raise refused(f"this is no plain softmax of all tokens so far ({', '.join(odd) or 'dropout, or not causal'})")
    if held is not None and (held.narrowed or held.changes_prompts):
        raise refused("a plan computes another attention in this layer")
    run = None if held is None or mask is not None else held.of_codes(q, tokens.clause, causal, kwargs)
    return tokens.attend(q, mask, factor, run).transpose(1, 2).contiguous()


def unpadded(
    held: LayerAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: bool, kwargs: dict[str, Any]
) -> Tensor | None:
    """A prompt whose mask hides its padding alone, by the layer's kernel; None for any other call."""
    kernel = held.kernel(q, k[:, :, : q.shape[2]], causal, kwargs)
    first = None if kernel is None else starts(mask, q.shape[2], kwargs.get("sliding_window"))
    return None if kernel is None or first is None else by_rows(kernel, q, k, v, first)


def described(query: Tensor, key: Tensor, value: Tensor, factor: float, causal: bool, kwargs: dict[str, Any]) -> AttentionCall:
    return AttentionCall(
        heads=query.shape[1],
        key_heads=key.shape[1],
        value_heads=value.shape[1],
        width=query.shape[3],
        value_width=value.shape[3],
        scaling=float(factor),
        softcap=kwargs.get("softcap"),
        causal=causal,
        window=kwargs.get("sliding_window"),
        dtype=str(query.dtype).removeprefix("torch."),
        others=tuple(name for name in STRANGE if kwargs.get(name) is not None),
    )


def windowed(queries: int, window: int | None, device: torch.device) -> Tensor | None:
    """The mask of a prompt that is longer than its window, which `attnopt_mask` left out; None where causal says all."""
    if window is None or queries <= window:
        return None
    at = torch.arange(queries, device=device)
    apart = at[:, None] - at
    return ((apart >= 0) & (apart < window))[None, None]


def own_way(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """What the model's file computes without us."""
    strange = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    eager = eager_of(type(module)) if strange or implementation_before(getattr(module, "config", None)) == "eager" else None
    if eager is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)
    if mask is None and kwargs["is_causal"] and q.shape[2] > 1:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.tensor(torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device)
        mask = torch.where(mask, torch.zeros((), dtype=q.dtype, device=q.device), lowest)
    del kwargs["is_causal"]
    return eager(module, q, k, v, mask, **kwargs)


def implementation_before(config: Any) -> str:
    """What a configuration had before it was led here. transformers asks several questions for each attribute that is read."""
    if config is None:
        return "sdpa"
    if torch.compiler.is_compiling():  # which knows no other way to an attribute
        return str(getattr(config, BEFORE, "sdpa"))
    held: dict[str, Any] = object.__getattribute__(config, "__dict__")
    return str(held.get(BEFORE, "sdpa"))


def eager_of(module_class: type[nn.Module]) -> Callable[..., Any] | None:
    """`eager_attention_forward` of the file that defines the class."""
    for kind in module_class.__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


def attnopt_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """A bool mask [B, 1, Q, K], or None where nothing but positions decides what is seen."""
    from transformers.masking_utils import fast_all, prepare_padding_mask, sdpa_mask
    from transformers.utils.import_utils import is_tracing

    known = isinstance(q_offset, int) and isinstance(kv_offset, int) and isinstance(kv_length, int)
    own = getattr(config, WINDOWS, False) and local_size == getattr(config, "sliding_window", None) is not None
    if allow_is_causal_skip and known and own and (attention_mask is None or not is_tracing(attention_mask)):
        first = kv_offset == q_offset == 0 and q_length == kv_length
        one = q_length == 1 and kv_length <= local_size and kv_offset + kv_length == q_offset + 1  # type: ignore[operator]
        if first or one:
            padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
            if padding is None or fast_all(padding[:, kv_offset : kv_offset + kv_length].bool()):
                return None
    return sdpa_mask(  # type: ignore[no-any-return]
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        attention_mask=attention_mask, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, config=config, **kwargs,
    )  # fmt: skip
