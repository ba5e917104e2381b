"""Try approximate rewrites of the whole model: keep one where its measured loss is inside the budget and it measures faster.

Candidates come strongest first; the first that holds the budget and gains beyond noise is kept. Every try is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from attnopt.ir.site import Host, Refusal
from attnopt.passes import Group, Pass
from attnopt.plan.choose import NOISE
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
    proposed = rewrite.propose(Group(host, ()))
    if isinstance(proposed, Refusal):
        return host, [RewriteReport(rewrite.name, "nothing proposed", False, proposed.reason)]
    tries: list[RewriteReport] = []
    before = host.runner()
    for candidate in proposed:
        trial = rewrite.apply(candidate, Group(host.copy(), ())).host
        trial.finish()
        after = trial.runner()
        loss = measured_loss(evidence.metric, evidence.outputs, [after(i) for i in evidence.inputs])
        times = in_turn({"before": lambda: before(evidence.timed), "after": lambda after=after: after(evidence.timed)}, seconds=1.0)
        ratio = times["after"].ratio(times["before"])
        inside, faster = loss <= evidence.budget, not measure or ratio <= 1.0 - NOISE
        said = f"{evidence.metric.name} {loss:.2g} {'within' if inside else 'over'} the budget {evidence.budget:g}, {1 / ratio:.2f}x the speed"
        tries.append(
            RewriteReport(
                rewrite.name,
                candidate.description,
                inside and faster,
                said if faster else f"{said}: no gain",
                evidence.metric.name,
                loss,
                evidence.budget,
                times["before"].median,
                times["after"].median,
            )
        )
        if inside and faster:
            return trial, tries
    return host, tries
