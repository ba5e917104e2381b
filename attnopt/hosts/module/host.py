"""A live transformers model as a host: its traced graph is what patterns and passes see, its modules are what changes in the end.

    ModuleHost.open(model, inputs)   ->   graph, sites, weights as in any torch host          live(rewritten)   ->   the model, changed

The graph carries the path of the module that made each node, so that every rewrite of it is read back as a change of modules
(`reading.changes_between`). What cannot be read back is refused before it is proposed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from attnopt.errors import UnsupportedFormat, UntraceableModel
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.fx.capture import Captured
from attnopt.hosts.module.changes import Change
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.widths import takes_cache
from attnopt.ir.expr import Term, conjuncts, operands
from attnopt.ir.site import Refusal, Site

TRACED = ("sdpa", "eager")  # implementations whose attention a trace shows
HELD = ("weights", "structure")  # what of a model its modules can hold
CARRIED = ("mask", "selection", "correction", "precision")  # what its attention function can compute otherwise


@dataclass
class ModuleHost(FxHost):
    """model: the one that was given, never changed. lifts: whether its caches may hold keys that are lifted when they are read, which
    saves memory and takes time at each step. folds: what of it exact algebra has changed before it was traced."""

    model: Any = None
    lifts: bool = False
    folds: tuple[Change, ...] = ()

    @classmethod
    def open(cls, model: Any, inputs: Mapping[str, Any], *, lifts: bool = False) -> ModuleHost:
        """Raises UnsupportedFormat for a model that has no function of transformers for its attention; what `capture` raises."""
        require_interface(model)
        captured = traced(model, inputs)
        made = FxHost.from_captured(captured)
        return cls(**{f.name: getattr(made, f.name) for f in fields(FxHost)}, model=model, lifts=lifts)

    def copy(self) -> ModuleHost:
        made = super().copy()
        return ModuleHost(
            **{f.name: getattr(made, f.name) for f in fields(FxHost)}, model=self.model, lifts=self.lifts, folds=self.folds
        )

    def caches(self, site: Site) -> bool:
        return self.lifts and takes_cache(self.model, site.source.module) is None

    def refuses_change(
        self, changes: Collection[str], sites: Collection[Site], shapes: Mapping[str, Mapping[str, int]]
    ) -> Refusal | None:
        for change in changes:
            if change in CARRIED:
                refused = next((found for s in sites if (found := refuses_attention(s, change)) is not None), None)
                if refused is not None:
                    return refused
            elif change not in HELD:
                return Refusal(
                    f"a live model goes on computing attention as its layers call it, without another {change}",
                    remedy="give example_inputs for a traced model, which takes it",
                )
        widths = {s.name: {axis: s.size(axis) for axis in "de"} for s in sites}
        for name, sizes in shapes.items():
            wide = widths.get(name, {})
            if any(sizes[axis] != wide.get(axis, sizes[axis]) for axis in "de" if axis in sizes):
                path = next(s.source.module for s in sites if s.name == name)
                if (refusal := takes_cache(self.model, path)) is not None:
                    return refusal
        return None


def refuses_attention(site: Site, change: str) -> Refusal | None:
    """None where the function that a live layer calls for its attention can compute it with another mask, selection, …"""
    spec = site.spec
    parts = conjuncts(spec.mask)
    windows = [p for p in parts if p != Term("causal") and not operands(p)]
    checks = (
        (bool(site.source.module), "no module is known that computes it"),
        (spec.normalizer.name == "softmax" and not spec.special, f"'{spec}' is left to the model's own attention"),
        (all(c.name in ("scale", "softcap") for c in spec.score), "the layer adds a bias to its scores"),
        (Term("causal") in parts, "it shows later keys, and a live model generates by its causal layers"),
        (
            change != "mask" or not windows,
            f"its cache holds what '{spec.mask}' shows, so positions in it are not those of tokens",
        ),
    )
    why = next((reason for ok, reason in checks if not ok), None)
    return None if why is None else Refusal(why, site.name, remedy="give example_inputs for a traced model, which may take it")


def traced(model: Any, inputs: Mapping[str, Any]) -> Captured:
    """The model's graph, by its own attention where a trace shows that, else by one that it also has."""
    own = getattr(model.config, "_attn_implementation", None)
    failure: UntraceableModel | None = None
    for implementation in (own,) if own in TRACED else TRACED:
        twin = shared_copy(model)
        twin.set_attn_implementation(implementation)
        try:
            return capture(twin, dict(inputs))
        except UntraceableModel as caught:
            failure = caught
    assert failure is not None
    raise failure


def require_interface(model: Any) -> None:
    """Raises UnsupportedFormat, with the first attention layer, for a class whose attention is written out in its layers."""
    if model._can_set_attn_implementation() and getattr(model, "_supports_attention_backend", False):
        return
    layers = [path for path, module in model.named_modules() if "attention" in type(module).__name__.lower()]
    raise UnsupportedFormat(
        f"the attention of {type(model).__name__} does not go through transformers' AttentionInterface",
        where=layers[0] if layers else type(model).__name__,
        next_move='Give example_inputs for a traced model, attnopt.optimize(model, inputs, host="graph").',
    )
