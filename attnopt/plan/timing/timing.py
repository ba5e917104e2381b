"""Paired timing: callables run in turn, so that drift of the machine hits all of them alike.

in_turn({"a": f, "b": g})  ->  {"a": Timing(median…), "b": …}     a b a b a b …
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from attnopt.cost.machine import clock as machine_clock

LONG = 10.0  # seconds of one round, from which on three rounds must do
STOOD_STILL = 1e-9  # seconds of a run for which the clock of the process did not advance, as it happens on virtual machines
WARM_UP = 0.2  # seconds for all callables together


@dataclass(frozen=True)
class Timing:
    """Seconds of every counted run, in order."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def ratio(self, other: Timing) -> float:
        """Median of the pair-by-pair ratios self / other."""
        return statistics.median(a / b for a, b in zip(self.runs, other.runs, strict=True))


def in_turn(
    callables: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.5,
    least: int = 5,
    most: int = 50,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time all callables in turn for about `seconds` each, at least `least` and at most `most` rounds after a warm-up.

    clock: what is counted; time.process_time for work on one thread counts nothing that other processes do.
    """
    until = time.perf_counter() + min(WARM_UP, seconds)
    for _ in range(most):  # caches, thread pools and clock rates settle
        for call in callables.values():
            call()
        if time.perf_counter() > until:
            break
    finished()
    started = time.perf_counter()
    for call in callables.values():
        call()
    finished()
    once = time.perf_counter() - started
    least = min(least, 3) if once > LONG else least
    rounds = int(min(most, max(least, seconds * len(callables) / max(once, 1e-9))))
    runs: dict[str, list[float]] = {name: [] for name in callables}
    for _ in range(rounds):
        for name, call in callables.items():
            started = clock()
            call()
            finished()
            runs[name].append(max(clock() - started, STOOD_STILL))
    return {name: Timing(tuple(times)) for name, times in runs.items()}


def counted() -> Callable[[], float]:
    """The clock for models: on one thread it counts this process alone, so that what others do on the machine is not counted."""
    return time.perf_counter if torch.cuda.is_initialized() else machine_clock()


def finished() -> None:
    """Wait for the GPU, where one is used: a call returns when its work is queued, not when it is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
