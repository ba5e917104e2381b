"""Try approximate rewrites of the whole model: keep one where its measured loss is inside the budget and it measures faster.

Candidates come strongest first; the first that holds the budget and gains beyond noise is kept. Every try is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from attnopt.ir.site import Host, Refusal, Runner
from attnopt.passes import Group, Pass
from attnopt.patterns import recognise
from attnopt.plan.choose import NOISE
from attnopt.plan.groups import Grouping
from attnopt.plan.quality import Metric, measured_loss
from attnopt.plan.timing import in_turn
from attnopt.report.data import RewriteReport


@dataclass(frozen=True)
class Evidence:
    """What losses are measured on: calibration inputs with the original's outputs, and the inputs that are timed."""

    inputs: Sequence[Mapping[str, Tensor]]
    outputs: Sequence[Sequence[Tensor]]
    timed: Mapping[str, Tensor]
    metric: Metric
    budget: float


def approximate(host: Host, rewrite: Pass, evidence: Evidence, *, measure: bool) -> tuple[Host, list[RewriteReport]]:
    """The host after the best candidate that holds the budget, and the record of all tries."""
    proposed = rewrite.propose(Grouping(host, recognise(host.graph).sites).whole()[0], None)
    if isinstance(proposed, Refusal):
        return host, [RewriteReport(rewrite.name, "nothing proposed", False, proposed.reason)]
    tries: list[RewriteReport] = []
    for candidate in proposed:
        trial = rewrite.apply(candidate, Group(host.copy(), ())).host
        trial.finish()
        tries.append(judged(rewrite.name, candidate.description, host.runner(), trial.runner(), evidence, measure))
        if tries[-1].kept:
            return trial, tries
    return host, tries


def judged(name: str, description: str, before: Runner, after: Runner, evidence: Evidence, measure: bool) -> RewriteReport:
    """One candidate: its loss on the calibration inputs, its time beside what it would replace, and whether it is kept."""
    loss = measured_loss(evidence.metric, evidence.outputs, [after(i) for i in evidence.inputs])
    calls = {"before": lambda: before(evidence.timed), "after": lambda: after(evidence.timed)}
    times = in_turn(calls, seconds=1.0)
    ratio = times["after"].ratio(times["before"])
    inside, faster = loss <= evidence.budget, not measure or ratio <= 1.0 - NOISE
    side = "within" if inside else "over"
    said = f"{evidence.metric.name} {loss:.2g} {side} the budget {evidence.budget:g}, {1 / ratio:.2f}x the speed"
    return RewriteReport(
        name=name,
        description=description,
        kept=inside and faster,
        why=said if faster else f"{said}: no gain",
        metric=evidence.metric.name,
        loss=loss,
        budget=evidence.budget,
        seconds_before=times["before"].median,
        seconds_after=times["after"].median,
    )
