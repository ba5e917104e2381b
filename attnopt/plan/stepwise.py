"""Timing of plans on the target, and roll-back: each kind of rewrite in a plan must make the model faster than the kinds before it.

exact -> + int8 of down_proj (1.31x: kept) -> + windows (0.98x: undone) -> + int8 of q, k, v (1.12x: kept)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from attnopt.ir.site import Runner
from attnopt.plan.effort import Spent
from attnopt.plan.losses import Losses
from attnopt.plan.proposals import Move
from attnopt.plan.timing import Timing, counted, in_turn
from attnopt.report.search import StepReport


@dataclass
class Stopwatch:
    """Times models in turn on inputs with weights, beside the exact plan: a time is the weighted sum over the inputs.

    reference: seconds of the exact plan, of the first time it ran. Savings are shares of it: a machine that slows down while a search
    runs must not make what is timed late look better. On one thread seconds are those of the process.
    """

    exact: Runner
    loads: Sequence[tuple[float, Mapping[str, Tensor]]]
    spent: Spent
    reference: float | None = None

    def times(self, runners: Mapping[str, Runner], longer: float = 1.0) -> dict[str, Timing]:
        """Of each model; `longer` times as much time for each as the effort says."""
        self.spent.measurements += len(runners)
        seconds = longer * self.spent.effort.timing / len(self.loads)
        return summed([(weight, self.once(runners, inputs, seconds)) for weight, inputs in self.loads])

    def once(self, runners: Mapping[str, Runner], inputs: Mapping[str, Tensor], seconds: float) -> dict[str, Timing]:
        calls: dict[str, Callable[[], object]] = {name: partial(run, inputs) for name, run in runners.items()}
        return in_turn(calls, seconds=seconds, clock=counted())

    def saved(self, changed: Runner) -> float:
        """Seconds that a model saves against the exact plan."""
        times = self.times({"before": self.exact, "after": changed})
        if self.reference is None:
            self.reference = times["before"].median
        return self.reference * (1.0 - times["after"].ratio(times["before"]))


def summed(loads: Sequence[tuple[float, Mapping[str, Timing]]]) -> dict[str, Timing]:
    """Weighted sums over loads, round by round, of as many rounds as all of them have."""
    rounds = min(len(t.runs) for _, times in loads for t in times.values())
    names = loads[0][1]
    return {n: Timing(tuple(sum(w * times[n].runs[i] for w, times in loads) for i in range(rounds))) for n in names}


def checked(
    moves: Sequence[Move], kinds: Mapping[Move, str], watch: Stopwatch, losses: Losses, allowed: float
) -> list[StepReport]:
    """Apply one kind after the other; a step that is not faster, or takes the loss out of the budget, is undone."""
    kept: list[Move] = []
    runner, steps = watch.exact, list[StepReport]()
    for kind in dict.fromkeys(kinds[m] for m in moves):
        own = [m for m in moves if kinds[m] == kind]
        trial = losses.workshop.built([*kept, *own]).runner()
        times = watch.times({"before": runner, "after": trial})
        loss = losses.of(in_order(moves, [*kept, *own]), f"after {kind}").mean
        ratio = times["after"].ratio(times["before"])
        slower, worse = ratio >= 1.0, loss > allowed
        said = f"measured {1 / ratio:.2f}x the speed of the model before it, loss {loss:.2g} so far"
        why = f"{said}: undone, {'it is not faster' if slower else 'that is over the budget'}" if slower or worse else said
        steps.append(StepReport(kind, len(own), not (slower or worse), why, times["before"].median, times["after"].median, loss))
        if steps[-1].kept:
            kept, runner = in_order(moves, [*kept, *own]), trial
    return steps


def in_order(moves: Sequence[Move], some: Sequence[Move]) -> list[Move]:
    """These moves in the order of the plan, so that equal sets have equal keys."""
    return [m for m in moves if m in some]
