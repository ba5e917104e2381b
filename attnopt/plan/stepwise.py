"""Timing of plans on the target, each in turn with the exact plan.

saved({"int8": moves, "windows": others})   ->   {"int8": 1.2e-3, "windows": -4e-5}   seconds of a call
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from attnopt.ir.site import Host, Runner
from attnopt.plan.effort import Spent
from attnopt.plan.proposals import Move
from attnopt.plan.timing import Timing, in_turn

KeyT = TypeVar("KeyT", bound=Hashable)


@dataclass
class Stopwatch:
    """Times models in turn on the example inputs, beside the exact plan.

    reference: seconds of the exact plan, of the first time it ran. Savings are shares of it: a machine that slows down while a search
    runs must not make what is timed late look better.
    """

    exact: Runner
    inputs: Mapping[str, Tensor]
    spent: Spent
    reference: float | None = None

    def times(self, runners: Mapping[str, Runner]) -> dict[str, Timing]:
        calls = {name: (lambda run=run: run(self.inputs)) for name, run in runners.items()}
        self.spent.measurements += len(calls)
        return in_turn(calls, seconds=self.spent.effort.timing)

    def saved(self, plans: Mapping[KeyT, Sequence[Move]], build: Callable[[Sequence[Move]], Host]) -> dict[KeyT, float]:
        """Seconds that each plan saves against the exact one; each is timed beside it, one at a time, as memory is bounded."""
        found: dict[KeyT, float] = {}
        for key, moves in plans.items():
            if self.spent.over and found:
                break
            times = self.times({"before": self.exact, "after": build(moves).runner()})
            if self.reference is None:
                self.reference = times["before"].median
            found[key] = self.reference * (1.0 - times["after"].ratio(times["before"]))
        return found
