"""Heads that a layer keeps narrower than its class makes them: keys of d channels and values of e, in attention and in every cache.

    v_proj(x), zero from channel e of a head on -> view(…, D) -> past_key_values.update(k, v)    ->    update(k[…, :d], v[…, :e])

The layer's forward stays its own. Its projections give heads of D channels, those beyond d and e zero (`layers.NarrowLinear`), and what it
hands to its cache is cut to the others first, whatever the cache's class; without a cache the same is done by one that keeps nothing.
Keys that are turned are turned back first, and lifted and turned again when they are read (`lifting`).
Key heads that query heads share unevenly come back from the cache once for each query head that reads them.
Queries are cut where attention is computed (`interface`), and where a cache policy reads them (`cut_queries`). Any other function of
transformers reads keys with their zeros put back, which change no score.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.hosts.module.interface import NAME
from attnopt.hosts.module.lifting import UP, Lifting, Turn, lifting
from attnopt.ir.site import Refusal

WIDTHS = "attnopt_widths"  # of an attention module: its Widths
PASTS = ("past_key_values", "layer_past", "past_key_value")  # what a forward may call its cache


@dataclass(frozen=True)
class Widths:
    """keys, values: channels of a head, of the `whole` that its class gives it. past: name and place of its forward's cache.

    turn: how keys are turned when they are read; None where they are read as they are kept. reads: the head of keys and values that each
    query head reads, where groups are of different sizes."""

    keys: int
    values: int
    whole: int
    past: tuple[str, int]
    turn: Turn | None = None
    names: tuple[str, ...] = ()  # of its forward's arguments, where keys turn
    reads: tuple[int, ...] = ()


class NarrowCache:
    """A cache, or None, as one layer is given it. padded: keys come back as wide as they were handed over. lift: how they are read."""

    def __init__(self, cache: Any, widths: Widths, padded: bool, lift: Lifting | None = None) -> None:
        self.cache, self.widths, self.padded, self.lift = cache, widths, padded, lift

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.widths.reads and key_states.shape[1] != max(self.widths.reads) + 1:
            raise ValueError(f"the layer makes {key_states.shape[1]} heads of keys, not {max(self.widths.reads) + 1}")
        k = key_states if self.lift is None else self.lift.flat(key_states)
        k, v = k[..., : self.widths.keys], value_states[..., : self.widths.values]
        if self.cache is not None:
            k, v = self.cache.update(k, v, layer_idx, *args, **kwargs)
        if self.lift is not None:
            k = self.lift.read(k, None if self.cache is None else self.cache.layers[layer_idx])
        elif self.padded and k.shape[-1] < key_states.shape[-1]:
            k = nn.functional.pad(k, (0, key_states.shape[-1] - k.shape[-1]))
        if not self.widths.reads:
            return k, v
        heads = torch.tensor(self.widths.reads, device=k.device)
        return k.index_select(1, heads), v.index_select(1, heads)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def narrow(
    module: nn.Module,
    keys: int,
    values: int,
    whole: int,
    turn: Mapping[str, Any] | None = None,
    up: Tensor | None = None,
    reads: Sequence[int] = (),
) -> None:
    """Let a layer keep heads of these widths from now on. turn, up: how keys are read, see `lifting`. reads: as in Widths.

    Raises ValueError for a forward that takes no cache, see `takes_cache`."""
    past = place_of_cache(type(module))
    if past is None:
        raise ValueError(f"{type(module).__name__}.forward takes no cache")
    made = Widths(keys, values, whole, past, reads=tuple(reads))
    if turn is not None:
        made = replace(made, turn=Turn.read(turn), names=arguments(type(module)))
    if not hasattr(module, WIDTHS):
        module.register_forward_pre_hook(cut, with_kwargs=True)
    setattr(module, WIDTHS, made)
    if up is not None:
        module.register_buffer(UP, up)


def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer's forward with a NarrowCache in place of its cache."""
    widths: Widths = getattr(module, WIDTHS)
    name, at = widths.past
    padded = getattr(module.config, "_attn_implementation", None) != NAME
    lift = None if widths.turn is None else lifting_of(module, widths, widths.turn, args, kwargs)
    if at < len(args):
        return (*args[:at], NarrowCache(args[at], widths, padded, lift), *args[at + 1 :]), kwargs
    return args, {**kwargs, name: NarrowCache(kwargs.get(name), widths, padded, lift)}


def lifting_of(module: nn.Module, widths: Widths, turn: Turn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lifting:
    named = dict(zip(widths.names, args, strict=False)) | kwargs
    own = getattr(module.config, "sliding_window", None)  # some layers leave it to the configuration, others say theirs
    windowed = getattr(module, "sliding_window", own) is not None
    return lifting(turn, getattr(module, UP), named.get("position_ids"), named.get("attention_mask"), windowed)


def cut_queries(module: nn.Module, q: Tensor) -> Tensor:
    """q [B, H, L, D] in the channels of the keys that the layer keeps, [B, H, L, d]: the others are zero, and meet no key."""
    widths: Widths | None = getattr(module, WIDTHS, None)
    return q if widths is None or widths.turn is not None else q[..., : widths.keys]


def spreads(module: nn.Module) -> bool:
    """Whether query heads of a layer share its key heads unevenly."""
    widths: Widths | None = getattr(module, WIDTHS, None)
    return widths is not None and bool(widths.reads)


def kept_heads(module: nn.Module, read: int) -> int:
    """Heads of keys in the cache of a layer whose attention reads so many."""
    widths: Widths | None = getattr(module, WIDTHS, None)
    return max(widths.reads) + 1 if widths is not None and widths.reads else read


def lifts(module: nn.Module) -> bool:
    """Whether a layer's keys are lifted when they are read."""
    widths: Widths | None = getattr(module, WIDTHS, None)
    return widths is not None and widths.turn is not None


def kept_keys(module: nn.Module, read: int) -> int:
    """Channels of a key in the cache of a layer whose attention reads so many."""
    widths: Widths | None = getattr(module, WIDTHS, None)
    return read if widths is None else widths.keys


def place_of_cache(kind: type[nn.Module]) -> tuple[str, int] | None:
    names = arguments(kind)
    return next(((name, names.index(name)) for name in PASTS if name in names), None)


def arguments(kind: type[nn.Module]) -> tuple[str, ...]:
    """Of its forward, without the module itself."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def takes_cache(model: nn.Module, path: str) -> Refusal | None:
    """Why the layer at a path cannot keep heads of other widths; None where it hands all its keys and values to a cache."""
    module = model.get_submodule(path) if path else None
    if module is not None and place_of_cache(type(module)) is not None:
        return None
    return Refusal("heads get another width where a layer hands them to its cache, and this one takes none", path or None)


def narrows_keys(model: nn.Module) -> bool:
    """Whether attention of some layer reads keys of another width than its class gives it."""
    found = (getattr(module, WIDTHS, None) for module in model.modules())
    return any(widths is not None and widths.turn is None and widths.keys != widths.whole for widths in found)
