"""The class of a live model: that of the original, and what attnopt adds to it.

    type(fast).__mro__  =  (LlamaForCausalLM, LiveModel, transformers' LlamaForCausalLM, …)      fast.report, fast.plan

The first keeps the name and the module of the class that it extends: transformers reads both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from attnopt.hosts.module.interface import HELD
from attnopt.hosts.module.saving import save
from attnopt.ir.by_layer import CacheForm, of_layer

RECORD = "attnopt_record"
CODES = "attnopt_cache_codes"


def generates(model: Any) -> bool:
    """Whether it is a language model of transformers with one stack of layers, whose `generate` is worth keeping."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, nn.Module) or not isinstance(model, transformers.PreTrainedModel):
        return False
    return bool(model.can_generate()) and not getattr(model.config, "is_encoder_decoder", False)


class LiveModel:
    """report: what was done and why. plan: to do it again. cache_policy: what `generate` keeps of its cache; None keeps all.

    cache_codes: how every call stores its cache, "int8" or a cache clause of a spec; None as it is. choose_codes: gives the layers their
    kernels for it. Everything else is the model's own."""

    report: Any = None
    plan: Any = None
    cache_policy: Any = None
    choose_codes: Callable[[Any, CacheForm], object] | None = None

    @property
    def cache_codes(self) -> str | None:
        return self.__dict__.get(CODES)

    @cache_codes.setter
    def cache_codes(self, words: str | None) -> None:
        """Layers get their kernels for such a cache, which are measured. Raises InputMismatch for what is no form of a live cache."""
        from attnopt.hosts.eviction.live_forms import keeps_blocks, live_form
        from attnopt.hosts.module.interface import lead

        clause = live_form(words)
        self.__dict__[CODES] = words
        if clause is not None and keeps_blocks(clause):
            lead(self)
        if clause is not None and self.choose_codes is not None:
            self.choose_codes(self, clause)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As the model's own, on a cache in codes where that is asked for. Raises AttnoptError for a cache that cannot hold them."""
        if self.cache_codes is not None:
            from attnopt.hosts.eviction.coded import prepared
            from attnopt.hosts.eviction.live_forms import live_form

            clause = live_form(self.cache_codes)
            assert clause is not None
            options = prepared(self, clause, args, options)  # type: ignore[arg-type]
        return super().__call__(*args, **options)  # type: ignore[misc]

    def generate(self, *args: Any, **options: Any) -> Any:
        """As the model's own, with the cache that its policy keeps. An attnopt.cache(…) around the call is used in place of it."""
        own = super().generate  # type: ignore[misc]
        if self.cache_policy is None:
            return own(*args, **options)
        from attnopt.hosts.eviction.patches import ACTIVE

        if ACTIVE.get() is not None:
            return own(*args, **options)
        with self.cache_policy.session():
            return own(*args, **options)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write a folder that `attnopt.load` reads: configuration, weights in the form they have here, report, plan and kernels.

        Raises OutputNotWritable where it cannot be written. Options of transformers' method do not apply.
        """
        kept = None if self.cache_policy is None else self.cache_policy.to_json()
        caches = {"cache_policy": kept, "cache_codes": self.cache_codes, "on_codes": on_codes(self)}
        save(self, Path(save_directory), {**getattr(self, RECORD), **caches})


def on_codes(model: Any) -> dict[str, tuple[str, str]]:
    """What each layer does on the cache that the model has, by path: the name of a kernel, and why."""
    from attnopt.hosts.eviction.live_forms import live_form

    form = live_form(model.cache_codes)
    held = {path: (m, getattr(m, HELD).on_codes) for path, m in model.named_modules() if hasattr(m, HELD)}
    there = {path: x for path, (m, x) in held.items() if form and x is not None and x.clause == of_layer(form, m.layer_idx)}
    return {path: (x.name, x.why) for path, x in there.items()}


@lru_cache(maxsize=64)
def live_class(kind: type) -> type:
    """The class with LiveModel in front of it."""
    own = kind.__mro__[2] if issubclass(kind, LiveModel) else kind
    return type(own.__name__, (LiveModel, own), {"__module__": own.__module__, "__qualname__": own.__qualname__})


def as_live(
    model: Any,
    report: Any,
    plan: Any,
    record: Mapping[str, Any],
    cache_policy: Any = None,
    cache_codes: str | None = None,
    choose_codes: Callable[[Any, CacheForm], object] | None = None,
) -> Any:
    """The model itself, with another class. record: plain data for its folder. Its layers have what they need for cache_codes already."""
    model.__class__ = live_class(type(model))  # type: ignore[arg-type]
    model.report, model.plan, model.cache_policy, model.cache_codes = report, plan, cache_policy, cache_codes
    model.choose_codes = choose_codes  # what is asked for from now on
    setattr(model, RECORD, dict(record))
    return model
