"""The live model that a rewritten graph describes: its modules changed, its attention by kernels, and both compared.

    host (as it was), result (rewritten)   ->   changes of modules   ->   the model again, which computes what the result does

The original model is a part of the host and is not touched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.errors import AttnoptError
from attnopt.hosts.fx import FxHost
from attnopt.hosts.module.changes import Change
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.host import ModuleHost
from attnopt.hosts.module.interface import BEFORE, CALLS, HELD, NAME, lead, register
from attnopt.hosts.module.layer_attention import AttentionCall, LayerAttention
from attnopt.hosts.module.reading import changes_between
from attnopt.hosts.module.reshaping import reshaped, shared_unevenly
from attnopt.hosts.module.widths import narrows_keys
from attnopt.ir.block import Lift
from attnopt.ir.expr import Term, conjuncts
from attnopt.ir.site import Refusal, Site
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import recognise
from attnopt.patterns.block import find_blocks
from attnopt.plan.live.folded import folded
from attnopt.plan.live.layers import Chooser, layer_attention, without_kernels

BESIDE = ("heads", "widths", "centred-rows")  # changes of a module that leave its parameters, and modules inside it, as they are


@dataclass(frozen=True)
class Live:
    """A model, what was changed in it, and why some of its layers compute attention as before (by path).

    idle: layers for which no kernel was worth it. windows: as in `attach`.
    """

    model: Any
    changes: tuple[Change, ...] = ()
    layers: Mapping[str, LayerAttention] = field(default_factory=dict)
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    idle: Mapping[str, LayerAttention] = field(default_factory=dict)
    windows: bool = False


def read_back(host: ModuleHost, result: FxHost) -> list[Change] | Refusal:
    """The changes of modules that turn the original into what the rewritten graph computes."""
    before, after = recognise(host.graph).sites, recognise(result.graph).sites
    left = {s.source.module: s for s in after}
    gone = [s.source.module for s in before if s.source.module not in left]
    changes = changes_between(host, result, host.model, gone)
    if isinstance(changes, Refusal):
        return changes
    stayed = [s for s in before if s.source.module in left]
    twins = [left[s.source.module] for s in stayed]
    if result is host:
        return changes
    algebra: list[Change] = []
    for fold in folded(host, result, host.model, {c.path for c in changes}):
        if isinstance(fold, Refusal):
            return fold
        algebra.append(fold)
    changes = without(changes, algebra) + algebra
    made: dict[tuple[str, str], Change] = {}
    blocks = zip(find_blocks(host.graph, stayed), find_blocks(result.graph, twins), strict=True)
    for site, twin, (old, new) in zip(stayed, twins, blocks, strict=True):
        if same_heads(site, twin) and new.part("k", Lift) is None and not shared_unevenly(new):
            continue
        found = reshaped(site.source.module, (site, old), (twin, new), host.model)
        if isinstance(found, Refusal):
            return found
        made |= {(change.kind, change.path): change for change in found}
    return without(changes, made.values()) + list(made.values())


def without(changes: Sequence[Change], others: Collection[Change]) -> list[Change]:
    """Those of other modules than these are of, with their parameters."""
    paths = {c.path for c in others if c.kind not in BESIDE}
    taken = {c.path.rpartition(".")[0] for c in others if c.kind == "constant"} | paths
    return [c for c in changes if c.path not in (paths if c.kind == "constant" else taken) and owner(c) not in paths]


def owner(change: Change) -> str:
    return change.path.rpartition(".")[0]


def same_heads(site: Site, other: Site) -> bool:
    return all(site.size(axis) == other.size(axis) for axis in "hgde")


def changed(model: Any, changes: Sequence[Change]) -> Any:
    """A copy of a model with these changes."""
    made = shared_copy(model)
    for change in changes:
        change.apply(made)
    return made


def live(
    host: ModuleHost,
    changes: Sequence[Change],
    inputs: Mapping[str, Tensor],
    chooser: Chooser,
    planned: Mapping[str, AttentionSpec] | None = None,
    *,
    fuses: bool = True,
    known: bool = False,
) -> Live | Refusal:
    """planned: specs of sites that a plan changes, by the paths of their modules. fuses: give the other layers kernels too. known: say what
    these compute also where they get none.

    A refusal where a layer does not run with the heads that it has now.
    """
    model, planned = changed(host.model, changes), planned or {}
    if not (fuses or known or planned or reshapes(changes)):
        return Live(model, tuple(changes))
    calls = calls_of(model, changes, inputs)
    if isinstance(calls, Refusal):
        return calls
    sites = {s.source.module: s for s in recognise(host.graph).sites}
    layers: dict[str, LayerAttention] = {}
    idle: dict[str, LayerAttention] = {}
    refusals: dict[str, Refusal] = {}
    for path, call in calls.items():
        if not (fuses or known or path in planned):
            continue
        site, spec = sites.get(path), planned.get(path)
        if site is None:
            found: LayerAttention | Refusal = Refusal("no attention was recognised there", path)
        elif fuses or spec is not None:
            found = layer_attention(site, call, chooser, spec)
        else:
            found = without_kernels(site, call, chooser.device)
        if isinstance(found, Refusal):
            refusals[path] = found
        elif any(found.names) or found.narrowed:
            layers[path] = found
        else:
            idle[path] = found
    refusals |= {
        path: Refusal("its attention does not go through transformers' AttentionInterface", path)
        for path in sites.keys() - calls.keys() - {c.path for c in changes if c.kind == "no-attention"}
    }
    windows = windows_known(sites, calls)
    attach(model, layers, windows=windows)
    return Live(model, tuple(changes), layers, refusals, idle, windows)


def reshapes(changes: Sequence[Change]) -> bool:
    """Whether some layer has heads of another width or number."""
    return any(c.kind in ("widths", "heads") for c in changes)


def calls_of(model: Any, changes: Sequence[Change], inputs: Mapping[str, Tensor]) -> dict[str, AttentionCall] | Refusal:
    """How each layer of a changed model calls its attention, by path; a refusal where a layer does not run with the heads that it has."""
    why = "the layer's own forward takes no heads of another width or number"
    try:
        calls = noted(model, inputs)
    except (AttnoptError, ValueError) as failure:
        if not reshapes(changes):
            raise
        return Refusal(f"{why}: {failure}", next(c.path for c in changes if c.kind in ("widths", "heads")))
    for each in (c for c in changes if c.kind == "heads" and c.path in calls):
        call, (heads, groups) = calls[each.path], (each.options[name] for name in ("num_heads", "num_key_value_groups"))
        if (call.heads, call.key_heads) != (heads, heads // groups):
            return Refusal(f"{why}: it makes {call.heads} of queries and {call.key_heads} of keys of them", each.path)
    return calls


def attach(model: Any, layers: Mapping[str, LayerAttention], *, windows: bool) -> None:
    """Let the model's layers compute attention by these; without any, and without narrower keys, it keeps the function that it had."""
    if not layers and not narrows_keys(model):
        return
    lead(model, windows)
    for path, held in layers.items():
        setattr(model.get_submodule(path), HELD, held)


def windows_known(sites: Mapping[str, Site], calls: Mapping[str, AttentionCall]) -> bool:
    """Whether each layer says itself which window its mask has, so that the mask need not be made."""
    return all(path in sites and window_of(sites[path]) == call.window for path, call in calls.items())


def window_of(site: Site) -> int | None:
    """The window among the conjuncts of a mask."""
    found = [part for part in conjuncts(site.spec.mask) if isinstance(part, Term) and part.name == "window"]
    return int(str(found[0].args[0])) if found else None


def noted(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, AttentionCall]:
    """How each layer calls its attention, by the path of its module."""
    register()
    probe = shared_copy(model)
    paths: dict[nn.Module, str] = {module: path for path, module in probe.named_modules()}
    for config in {id(m.config): m.config for m in probe.modules() if hasattr(m, "config")}.values():
        setattr(config, BEFORE, config._attn_implementation)
        config._attn_implementation_internal = NAME
    CALLS.append({})
    try:
        with torch.no_grad():
            probe(**inputs, use_cache=False)
    except Exception as failure:
        raise AttnoptError(
            f"{type(model).__name__} does not run with its attention given to attnopt: {failure}",
            next_move='Use host="graph" with example inputs.',
        ) from failure
    finally:
        found = CALLS.pop()
    return {paths[module]: call for module, call in found.items()}
