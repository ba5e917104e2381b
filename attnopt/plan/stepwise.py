"""Timing of plans on the target, and roll-back: each kind of rewrite in a plan must make the model faster than the kinds before it.

exact -> + int8 of down_proj (1.31x: kept) -> + windows (0.98x: undone) -> + int8 of q, k, v (1.12x: kept)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from attnopt.ir.site import Host, Runner
from attnopt.plan.effort import Spent
from attnopt.plan.losses import Losses
from attnopt.plan.proposals import Move
from attnopt.plan.timing import Timing, in_turn
from attnopt.report.search import StepReport

KeyT = TypeVar("KeyT", bound=Hashable)


@dataclass
class Stopwatch:
    """Times models in turn on the example inputs, beside the exact plan."""

    exact: Runner
    inputs: Mapping[str, Tensor]
    spent: Spent

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
            found[key] = times["before"].median * (1.0 - times["after"].ratio(times["before"]))
        return found


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
