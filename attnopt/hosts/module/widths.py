"""Heads that a layer keeps narrower than its class makes them: keys of d channels and values of e, in attention and in every cache.

    v_proj(x), zero from channel e of a head on -> view(…, D) -> past_key_values.update(k, v)    ->    update(k[…, :d], v[…, :e])

The layer's forward stays its own. Its projections give heads of D channels, those beyond d and e zero (`layers.NarrowLinear`), and what it
hands to its cache is cut to the others first, whatever the cache's class; without a cache the same is done by one that keeps nothing.
Queries are cut where attention is computed (`interface`), and where a cache policy reads them (`cut_queries`). Any other function of
transformers reads keys with their zeros put back, which change no score.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from attnopt.hosts.module.interface import NAME
from attnopt.ir.site import Refusal

WIDTHS = "attnopt_widths"  # of an attention module: its Widths
PASTS = ("past_key_values", "layer_past", "past_key_value")  # what a forward may call its cache


@dataclass(frozen=True)
class Widths:
    """keys, values: channels of a head, of the `whole` that its class gives it. past: name and place of its forward's cache."""

    keys: int
    values: int
    whole: int
    past: tuple[str, int]


class NarrowCache:
    """A cache, or None, as one layer is given it. padded: keys come back as wide as they were handed over."""

    def __init__(self, cache: Any, widths: Widths, padded: bool) -> None:
        self.cache, self.widths, self.padded = cache, widths, padded

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        k, v = key_states[..., : self.widths.keys], value_states[..., : self.widths.values]
        if self.cache is not None:
            k, v = self.cache.update(k, v, *args, **kwargs)
        if self.padded and k.shape[-1] < key_states.shape[-1]:
            k = nn.functional.pad(k, (0, key_states.shape[-1] - k.shape[-1]))
        return k, v

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def narrow(module: nn.Module, keys: int, values: int, whole: int) -> None:
    """Let a layer keep heads of these widths from now on. Raises ValueError for a forward that takes no cache, see `takes_cache`."""
    past = place_of_cache(type(module))
    if past is None:
        raise ValueError(f"{type(module).__name__}.forward takes no cache")
    if not hasattr(module, WIDTHS):
        module.register_forward_pre_hook(cut, with_kwargs=True)
    setattr(module, WIDTHS, Widths(keys, values, whole, past))


def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer's forward with a NarrowCache in place of its cache."""
    widths: Widths = getattr(module, WIDTHS)
    name, at = widths.past
    padded = getattr(module.config, "_attn_implementation", None) != NAME
    if at < len(args):
        return (*args[:at], NarrowCache(args[at], widths, padded), *args[at + 1 :]), kwargs
    return args, {**kwargs, name: NarrowCache(kwargs.get(name), widths, padded)}


def cut_queries(module: nn.Module, q: Tensor) -> Tensor:
    """q [B, H, L, D] in the channels of the keys that the layer keeps, [B, H, L, d]: the others are zero, and meet no key."""
    widths: Widths | None = getattr(module, WIDTHS, None)
    return q if widths is None else q[..., : widths.keys]


def place_of_cache(kind: type[nn.Module]) -> tuple[str, int] | None:
    names = list(inspect.signature(kind.forward).parameters)[1:]
    return next(((name, names.index(name)) for name in PASTS if name in names), None)


def takes_cache(model: nn.Module, path: str) -> Refusal | None:
    """Why the layer at a path cannot keep heads of other widths; None where it hands all its keys and values to a cache."""
    module = model.get_submodule(path) if path else None
    if module is not None and place_of_cache(type(module)) is not None:
        return None
    return Refusal("heads get another width where a layer hands them to its cache, and this one takes none", path or None)


def narrows_keys(model: nn.Module) -> bool:
    """Whether some layer has keys of another width than its class gives it."""
    found = (getattr(module, WIDTHS, None) for module in model.modules())
    return any(widths is not None and widths.keys != widths.whole for widths in found)
