"""Exact rewrites of weights in a live model, taken where its own forward is faster by them.

    traced graph -> fold -> what it changes in the modules -> those modules -> timed beside the model -> traced again, where it is taken

What follows, kernels and approximate rewrites, is of the model after its folds, traced from it: a layer that makes what three made has the
name of its own module there. Kernels and caches of a fold's graph are never run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from attnopt.cost.target import load_target
from attnopt.errors import PlanError
from attnopt.hosts.module.host import ModuleHost
from attnopt.ir.site import Host, Refusal, Runner
from attnopt.passes import Pass
from attnopt.patterns import recognise
from attnopt.plan.folding import Folded, Folding, edited, fold_steps, is_fold
from attnopt.plan.live.converting import changed, read_back
from attnopt.plan.live.generating import on_prompts, usual
from attnopt.plan.memory.fitting import left
from attnopt.plan.pipeline import Request, with_shapes
from attnopt.plan.replay import OTHER, moves_from
from attnopt.report.data import RewriteReport
from attnopt.report.plan import PlanStep

LITTLE = 0.1  # of the time of all loads: one that takes less does not decide
SHARE = 0.5  # of the memory that is left, which another copy of all weights may take for a trial


@dataclass(frozen=True)
class LiveFolding(Folding):
    """inputs: that the model is traced on, without its cache."""

    inputs: Mapping[str, Any] = field(default_factory=dict)

    def held(self, before: Host, trial: Host) -> Host | Refusal:
        """With the model that the fold's changes of modules make, not traced yet."""
        assert isinstance(before, ModuleHost) and isinstance(trial, ModuleHost)
        changes = read_back(before, trial)
        if isinstance(changes, Refusal):
            return replace(changes, reason=f"a live model cannot hold it: {changes.reason}")
        if not changes:
            return Refusal("a live model computes by its own layers what the fold would change, and none of them holds it")
        trial.model, trial.folds = changed(before.model, changes), (*before.folds, *changes)
        return trial

    def settled(self, host: Host) -> Host:
        """Traced again."""
        assert isinstance(host, ModuleHost)
        made = ModuleHost.open(host.model, self.inputs, lifts=host.lifts)
        made.folds = host.folds
        return made

    def measured(self, before: Host, trial: Host) -> float:
        """On the loads that most of the time goes into: a prompt counts little beside many steps, and takes long to time."""
        took = []
        for weight, inputs in self.loads:
            started = time.perf_counter()
            self.runner(before)(inputs)
            took.append(weight * (time.perf_counter() - started))
        loads = [load for load, seconds in zip(self.loads, took, strict=True) if seconds >= LITTLE * sum(took)]
        return Folding.measured(replace(self, loads=loads), before, trial)

    def runner(self, host: Host) -> Runner:
        assert isinstance(host, ModuleHost)
        model = host.model

        def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            with torch.no_grad():
                return [model(**inputs, use_cache=False).logits]

        return run

    def untold(self, rewrite: Pass) -> str:
        handed = rewrite.name == "pack-projections" and self.target.kind == "cpu"
        return "layers hand their parts to each other, which takes as long as a product saves" if handed else ""

    def again(self, host: ModuleHost, steps: Sequence[PlanStep]) -> Folded:
        """The folds of a plan, without asking whether they save anything. Raises PlanError for a model that they are not of."""
        made = Folded(host)
        for _, own in groupby(steps, key=lambda s: s.rewrite):
            moves = moves_from(own, made.host)
            trial = self.held(made.host, edited(made.host, moves))
            if isinstance(trial, Refusal):
                raise PlanError(str(trial), next_move=OTHER)
            made = Folded(self.settled(trial), (*made.moves, *moves))
        return made


def fold_live(host: ModuleHost, request: Request) -> Folded:
    """The model after the folds that are worth it, or those of a plan that was given.

    Without a workload they are timed on a prompt like the inputs and as many steps as are usual behind it, each a prompt of one token.
    """
    assert request.inputs is not None
    inputs = {**request.inputs, "use_cache": False}
    target = load_target(request.target)[0]
    if request.plan is not None:
        folding = LiveFolding(request.select, target, request.runtime, (), (), inputs=inputs)
        return folding.again(host, fold_steps(request.plan.steps)[0])
    passes = [p for p in request.passes if is_fold(p)]
    if not passes:
        return Folded(host)
    weights, room = sum(p.numel() * p.element_size() for p in host.model.parameters()), left()
    if room is not None and weights > SHARE * room:
        why = f"a trial would hold {weights / 2**20:,.0f} MiB of weights again, of {room / 2**20:,.0f} MiB that are left"
        return Folded(host, (), tuple(RewriteReport(p.name, "not tried", False, why) for p in passes))
    sites = recognise(host.graph).sites
    length = next(iter(request.inputs.values())).shape[1]
    request = with_shapes(host, sites, replace(request, workload=request.workload or on_prompts(usual(length))))
    assert request.workload is not None
    known = host.graph.sizes(request.inputs or {})
    sizes = [(b.weight, {**known, **b.sizes}) for b in request.workload.bind(sites)]
    return LiveFolding(request.select, target, request.runtime, request.shaped.loads, sizes, request.named, inputs).of(
        host, passes
    )


def without_folds(request: Request) -> Request:
    """What is asked of the model after its folds."""
    plan = request.plan
    rest = None if plan is None else replace(plan, steps=fold_steps(plan.steps)[1])
    return replace(request, passes=tuple(p for p in request.passes if not is_fold(p)), plan=rest)
