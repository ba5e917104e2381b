"""The graph that a plan makes of a live model, whether modules can hold it, and whether the model that they make computes the same.

host, plan   ->   Rewritten: with the model's own attention, from which modules are read; with kernels, for comparison
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.cost.target import load_target
from attnopt.hosts.module.host import ModuleHost
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec
from attnopt.plan.judge.verify import require_equal, require_rounded_alike
from attnopt.plan.live.converting import Live, calls_of, changed, read_back, reshapes
from attnopt.plan.live.nudging import nudged
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.workshop import Workshop, respecified
from attnopt.plan.pipeline import Request
from attnopt.plan.replay import moves_from
from attnopt.report.data import Report


def unheld(host: ModuleHost, inputs: Mapping[str, Tensor], result: Any) -> Refusal | None:
    """Why a rewritten graph cannot be read back as the modules of a live model; None where it can."""
    found: Any = read_back(host, result)
    if not isinstance(found, Refusal) and reshapes(found):
        found = calls_of(changed(host.model, found), found, inputs)
    return replace(found, reason=f"a live model cannot hold it: {found.reason}") if isinstance(found, Refusal) else None


@dataclass(frozen=True)
class Rewritten:
    """The graph after a plan. edited: with the model's own attention, what stands in its nodes is read back from them. whole: with
    kernels for the attentions that the plan changed. specs: of those, by the paths of their modules.
    """

    edited: ModuleHost
    whole: ModuleHost
    specs: Mapping[str, AttentionSpec] = field(default_factory=dict)


def rewritten(host: ModuleHost, report: Report, request: Request) -> Rewritten:
    if report.plan is None or not report.plan.steps:
        return Rewritten(host, host)
    sizes = host.graph.sizes(request.inputs or {})
    shop = Workshop(host, {}, load_target(request.target)[0], request.runtime, request.opset, sizes)
    moves = shop.arrays.ready(moves_from(report.plan.steps, host))
    edited: Any = shop.edited(host.copy(), [m for m in moves if m.edits], {})
    others = [m for m in moves if not m.edits]
    if not others:
        return Rewritten(edited, edited)
    specs = {site.source.module: site.spec for site in respecified(Grouping(edited), others).values()}
    whole: Any = shop.rewritten(moves, brief=True)
    return Rewritten(edited, whole, specs)


def compare(host: ModuleHost, plan: Rewritten, made: Live, inputs: Mapping[str, Tensor]) -> None:
    """Raises AccuracyError where the live model computes something else than the graph that it was made of.

    With another attention both read the tokens without padding: there the live model computes what only prompts have.
    """
    if plan.specs:
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
    original = host.runner()(inputs)
    with torch.no_grad():
        logits = [made.model(**inputs, use_cache=False).logits]
    rounded = any(spec.selection or spec.precision for spec in plan.specs.values())
    if made.changes or rounded:
        require_rounded_alike(plan.whole.runner()(inputs), logits, original, nudged(made.model, inputs))
    else:
        require_equal(original if plan.whole is host else plan.whole.runner()(inputs), logits)
