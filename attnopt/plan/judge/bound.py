"""An upper bound on a mean of which only some samples are known: the one-sided 95 % bootstrap-t bound.

    resample n of n, t* = (mean* - mean) / se*          bound = mean - (5 % quantile of t*) * se

Losses are skewed (most samples lose little, some much), where the plain percentile of resampled means covers the true mean far too
seldom: for sixteen log-normal losses (sigma 1) in 81 % of 4,000 trials, this one in 89 %; for exponential losses in 93 %, for normal
ones in 95 % (`tests/plan/judge/test_bound.py`). The samples are independent sequences, never tokens of one.
Source: Efron and Tibshirani, "An Introduction to the Bootstrap", chapter 12.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
LEAST_SPREAD = 0.2  # of the sample's own: a resample that drew one value n times has none, and its t would be infinite


def upper_bound(values: Sequence[float], *, seed: int = 0, level: float = LEVEL) -> float:
    """The number that the true mean is below with this confidence. Equal values, equal seed: equal bound.

    The mean itself where all values are equal. Infinite for no value, for a single one that is not zero, and for an infinite one.
    """
    x = np.asarray(values, dtype=np.float64)
    if not len(x) or not np.isfinite(x).all():
        return math.inf
    if len(x) == 1:
        return math.inf if x[0] else 0.0
    if x.min() == x.max():
        return float(x[0])
    spread = float(x.std(ddof=1)) / math.sqrt(len(x))
    drawn = x[np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))]
    spreads = drawn.std(1, ddof=1) / math.sqrt(len(x))
    t = (drawn.mean(1) - x.mean()) / np.maximum(spreads, LEAST_SPREAD * spread)
    return float(x.mean() - np.quantile(t, 1.0 - level) * spread)
