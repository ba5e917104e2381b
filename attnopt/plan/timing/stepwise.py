"""Timing of plans on the target, each in turn with the exact plan.

saved({"int8": moves, "windows": others})   ->   {"int8": 1.2e-3, "windows": -4e-5}   seconds of a call
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from attnopt.ir.site import Runner
from attnopt.plan.search.effort import Spent
from attnopt.plan.timing.timing import Timing, counted, in_turn


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
