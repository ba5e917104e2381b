"""How fast the machine runs at the moment: a product that is timed in turn with whatever is measured.

    kernel 1.2 ms beside a product of 0.35 ms, which takes 0.21 ms when nothing slows the processor   ->   0.72 ms

Shared machines run up to twice as slow for seconds at a time, all work alike, and their clocks do not tell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from attnopt.plan.timing.timing import in_turn

SIDE = 256
SETTLE = 1.0  # seconds in which the product is run at its fastest at least once
REFERENCE = "the product that tells the pace"
Clock = Callable[[], float]


@dataclass(frozen=True)
class Pace:
    """seconds: of the product at full speed."""

    seconds: float
    call: Callable[[], object]
    clock: Clock

    @classmethod
    def found(cls, clock: Clock, settle: float = SETTLE) -> Pace:
        one = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))

        def call() -> object:
            return one @ one

        call()
        runs, until = list[float](), time.perf_counter() + settle
        while not runs or time.perf_counter() < until:
            started = clock()
            call()
            runs.append(clock() - started)
        return cls(sorted(runs)[len(runs) // 10], call, clock)

    def times(self, calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
        """Of each call the seconds that it would take at full speed: the median of its ratios to the product beside it."""
        if not calls:
            return {}
        found = in_turn({REFERENCE: self.call, **calls}, seconds=seconds, clock=self.clock)
        return {name: found[name].ratio(found[REFERENCE]) * self.seconds for name in calls}
