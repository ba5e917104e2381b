"""A model of transformers as a trace can read it: live ones, and those whose attention is a kernel that no trace shows, by their own sdpa.

    fast (layers by tvm-decode, "attnopt")   ->   the same class and weights, layers in codes as they are, attention "sdpa" or "eager"

What a plan hides of a layer's keys is not in its weights, so a model that holds such a plan is refused rather than read as if it hid none.
"""

from __future__ import annotations

from typing import Any

from attnopt.errors import UnsupportedFormat
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.host import TRACED
from attnopt.hosts.module.interface import BEFORE, HELD, WINDOWS
from attnopt.hosts.module.model import CODES, PAGED, PAGES, RECORD, LiveModel, generates
from attnopt.ir.spec import parse

OF_LIVE = ("report", "plan", "cache_policy", CODES, PAGES, PAGED, "choose_codes", "choose_pages", RECORD)


def traceable(model: Any) -> Any:
    """The model itself where it can be traced as it is; else a copy that shares its weights. Raises UnsupportedFormat, see above."""
    if not generates(model):
        return model
    if not isinstance(model, LiveModel):
        own = getattr(model.config, "_attn_implementation", None)
        return model if own in TRACED or not model._can_set_attn_implementation() else by_own(shared_copy(model), "sdpa")
    for path, module in model.named_modules():  # type: ignore[attr-defined]
        held = getattr(module, HELD, None)
        if held is not None and (held.narrowed or planned(held.spec)):
            raise UnsupportedFormat(
                f"a plan changed what this layer computes, '{held.spec}', and a trace of its weights would not show it",
                where=path,
                next_move="Give the original model, with plan= or passes= of the same names.",
            )
    before = getattr(model.config, BEFORE, None) or model.config._attn_implementation  # type: ignore[attr-defined]
    return by_own(undressed(shared_copy(model)), before if before in TRACED else "sdpa")


def runs_here(model: Any) -> bool:
    """Whether its own attention computes on the device that it is on: flash attention has kernels for GPUs alone."""
    own = str(getattr(model.config, "_attn_implementation", None))
    return not own.startswith("flash") or next(model.parameters()).device.type != "cpu"


def planned(spec: str) -> bool:
    """Whether it is more than a mask of positions: such a spec comes of a plan alone."""
    parsed = parse(spec)
    return bool(parsed.selection or parsed.correction or parsed.precision)


def undressed(model: Any) -> Any:
    """A copy of a live model, of its own class again and without kernels; in place."""
    model.__class__ = type(model).__mro__[2]
    for name in OF_LIVE:
        model.__dict__.pop(name, None)
    for module in model.modules():
        module.__dict__.pop(HELD, None)
    return model


def by_own(model: Any, implementation: str) -> Any:
    """Its attention as transformers computes it; in place."""
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        for name in (BEFORE, WINDOWS):
            config.__dict__.pop(name, None)
        config._attn_implementation_internal = implementation
    return model
