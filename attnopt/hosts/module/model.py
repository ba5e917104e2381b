"""The class of a live model: that of the original, and what attnopt adds to it.

    type(fast).__mro__  =  (LlamaForCausalLM, LiveModel, transformers' LlamaForCausalLM, …)      fast.report, fast.plan

The first keeps the name and the module of the class that it extends: transformers reads both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from attnopt.errors import InputMismatch
from attnopt.hosts.eviction.paged import Choosing
from attnopt.hosts.module.interface import HELD
from attnopt.hosts.module.saving import save
from attnopt.ir.by_layer import CacheForm, of_layer
from attnopt.ir.clause import Clause

RECORD = "attnopt_record"
CODES, PAGES = "attnopt_cache_codes", "attnopt_cache_pages"
PAGED = "attnopt_paged_layers"


def generates(model: Any) -> bool:
    """Whether it is a language model of transformers with one stack of layers, whose `generate` is worth keeping."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, nn.Module) or not isinstance(model, transformers.PreTrainedModel):
        return False
    return bool(model.can_generate()) and not getattr(model.config, "is_encoder_decoder", False)


class LiveModel:
    """report: what was done and why. plan: to do it again. cache_policy: what `generate` keeps of its cache; None keeps all.

    cache_codes: how every call stores its cache, "int8" or a cache clause of a spec; None as it is. cache_pages: how one query chooses what
    it reads of a cache, such as "pages(16, 64, recent=1)"; None reads all. choose_codes, choose_pages: give the layers their kernels for
    them. Everything else is the model's own."""

    report: Any = None
    plan: Any = None
    cache_policy: Any = None
    choose_codes: Callable[[Any, CacheForm], object] | None = None
    choose_pages: Callable[[Any, Clause], object] | None = None

    @property
    def cache_codes(self) -> str | None:
        return self.__dict__.get(CODES)

    @cache_codes.setter
    def cache_codes(self, words: str | None) -> None:
        """Layers get their kernels for such a cache, which are measured. Raises InputMismatch for what is no form of a live cache."""
        from attnopt.hosts.eviction.live_forms import keeps_blocks, live_form
        from attnopt.hosts.module.interface import lead

        clause = live_form(words)
        require_one(words, self.cache_pages)
        self.__dict__[CODES] = words
        if clause is not None and keeps_blocks(clause):
            lead(self)
        if clause is not None and self.choose_codes is not None:
            self.choose_codes(self, clause)

    @property
    def cache_pages(self) -> str | None:
        return self.__dict__.get(PAGES)

    @cache_pages.setter
    def cache_pages(self, words: str | None) -> None:
        """Layers get their kernel for pages. Raises InputMismatch for what is no choice of pages, or where no layer can choose any."""
        from attnopt.hosts.eviction.paged import page_choice

        clause = page_choice(words)
        require_one(self.cache_codes, words)
        if clause is None:
            read_whole(self)
        elif self.choose_pages is not None:
            self.choose_pages(self, clause)
        self.__dict__[PAGES], self.__dict__[PAGED] = words, choosing(self)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As the model's own, on a cache in codes or in pages where one is asked for, else in rooms where it is long.

        Raises AttnoptError for a cache that cannot be as it is asked for."""
        form = self.cache_form()
        if form is not None:
            from attnopt.hosts.eviction.preparing import prepared

            options = prepared(self, form, args, options)  # type: ignore[arg-type]
        elif (cache := options.get("past_key_values")) is not None and self.cache_codes is self.cache_pages is None:
            from attnopt.hosts.eviction.in_rooms import in_rooms
            from attnopt.hosts.eviction.preparing import compiled

            if not compiled(self):
                in_rooms(cache)
        return super().__call__(*args, **options)  # type: ignore[misc]

    def cache_form(self) -> Callable[[Any, bool, Any], None] | None:
        """What makes the cache of a call one as it is asked for. Where attnopt.cache(…) lets tokens leave, what is left is read whole."""
        if self.cache_codes is not None:
            from attnopt.hosts.eviction.coded import as_codes
            from attnopt.hosts.eviction.live_forms import live_form

            clause = live_form(self.cache_codes)
            assert clause is not None
            return as_codes(clause)
        if self.cache_pages is None:
            return None
        from attnopt.hosts.eviction.paged import in_pages
        from attnopt.hosts.eviction.patches import ACTIVE

        return None if ACTIVE.get() is not None else lambda cache, hands, mask: in_pages(cache, self.__dict__[PAGED], hands)

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
        codes = {"cache_codes": self.cache_codes, "on_codes": on_codes(self)}
        pages = {"cache_pages": self.cache_pages, "on_pages": on_pages(self)}
        caches = {"cache_policy": kept, **codes, **pages}
        save(self, Path(save_directory), {**getattr(self, RECORD), **caches})


def on_codes(model: Any) -> dict[str, tuple[str, str]]:
    """What each layer does on the cache that the model has, by path: the name of a kernel, and why."""
    from attnopt.hosts.eviction.live_forms import live_form

    form = live_form(model.cache_codes) or (model.cache_policy and model.cache_policy.clause)
    held = {path: (m, getattr(m, HELD).on_codes) for path, m in model.named_modules() if hasattr(m, HELD)}
    there = {path: x for path, (m, x) in held.items() if form and x is not None and x.clause == of_layer(form, m.layer_idx)}
    return {path: (x.name, x.why) for path, x in there.items()}


def on_pages(model: Any) -> dict[str, tuple[str, str]]:
    """How each layer reads the pages of a cache, by path, as `on_codes`."""
    held = {path: getattr(m, HELD).on_pages for path, m in model.named_modules() if hasattr(m, HELD)}
    return {path: (x.name, x.why) for path, x in held.items() if x is not None}


def choosing(model: Any) -> dict[int, Choosing]:
    """How layers choose pages, by the numbers of those that do."""
    held = ((m, getattr(m, HELD).on_pages) for m in model.modules() if hasattr(m, HELD))
    return {m.layer_idx: Choosing(x.size, x.least) for m, x in held if x is not None and x.run is not None}


def read_whole(model: Any) -> None:
    """No layer chooses pages any more."""
    for module in model.modules():
        if hasattr(module, HELD):
            setattr(module, HELD, replace(getattr(module, HELD), on_pages=None))


def require_one(codes: str | None, pages: str | None) -> None:
    """Raises InputMismatch where a cache is asked for that no kernel reads."""
    if codes is not None and pages is not None:
        raise InputMismatch(
            f"a cache that is stored as {codes} has no bounds by which {pages} could be chosen",
            next_move="Set model.cache_codes = None, or model.cache_pages = None.",
        )


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
    cache_pages: str | None = None,
    choose_pages: Callable[[Any, Clause], object] | None = None,
) -> Any:
    """The model itself, with another class. record: plain data for its folder. Its layers have what they need for its cache already."""
    model.__class__ = live_class(type(model))  # type: ignore[arg-type]
    model.report, model.plan, model.cache_policy = report, plan, cache_policy
    model.choose_codes = model.choose_pages = None
    for name in (CODES, PAGES):  # of a model that was live before
        model.__dict__.pop(name, None)
    model.cache_codes, model.cache_pages = cache_codes, cache_pages
    model.choose_codes, model.choose_pages = choose_codes, choose_pages  # what is asked for from now on
    setattr(model, RECORD, dict(record))
    return model
