"""How benchmarks/budget.py compares: a plan with what was promised, and a choice made by hand with the plans of a frontier.

behind(choice)  =  every plan that loses no more, or not surely more, takes more than NOISE longer
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NOISE = 0.03  # a difference of times below this share is a tie
RESAMPLES = 2000


@dataclass(frozen=True)
class Measured:
    """One model on unseen documents. loss: mean KL, with its 95 % interval and one-sided bound; share of the original's time, alike.

    budget: None for a choice made by hand. promised: the bound of the loss when the plan was chosen. losses: of each document; runs:
    seconds of each round.
    """

    name: str
    budget: float | None
    loss: float
    low: float
    high: float
    bound: float
    promised: float | None
    share: float
    fastest: float
    slowest: float
    seconds: float
    rewrites: str
    losses: tuple[float, ...]
    runs: tuple[float, ...]


@dataclass(frozen=True)
class Compared:
    """The fastest plan that loses no more than a choice made by hand, and whether that is slower than the choice."""

    plan: str
    loss: float
    share: float
    ratio: float
    behind: bool
    verdict: str


def interval(values: Sequence[float], of: Callable[..., Any], seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of a statistic."""
    x = np.asarray(values, dtype=np.float64)
    drawn = x[np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))]
    low, high = np.quantile(of(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)


def loses_no_more(plan: Measured, choice: Measured) -> bool:
    """Not surely more: the interval of the difference, document by document, does not lie above 0."""
    return interval(np.subtract(plan.losses, choice.losses), np.mean)[0] <= 0  # type: ignore[arg-type]


def compared(choice: Measured, plans: Sequence[Measured]) -> Compared:
    """A choice made by hand beside the fastest of the plans that lose no more; a plan without loss is always one."""
    fits = [p for p in plans if p.loss <= choice.loss or loses_no_more(p, choice)]
    best = min(fits, key=lambda p: p.share)
    ratio = float(np.median(np.divide(best.runs, choice.runs)))
    largest = max(plans, key=lambda p: p.budget or 0.0)
    behind = ratio > 1 + NOISE
    beyond = behind and largest.budget is not None and choice.loss > largest.budget
    said = f"{1 / ratio:.2f}x as fast" if ratio <= 1 - NOISE else "as fast" if not behind else f"{ratio:.2f}x the time"
    verdict = f"{said}; it loses more than the largest budget" if beyond else f"no, {said}" if not behind else f"**yes**, {said}"
    return Compared(best.name, best.loss, best.share, ratio, behind and not beyond, verdict)
