"""The shares of kernel families that explain measured times best.

    [(phases of a kernel at a shape, seconds), …]   ->   {"sdpa": Efficiency(products=0.74, scores=0.12, …), "elementwise": …}

All families at once, because kernels share passes. Least squares on the logarithms of predicted over measured, so that a point of a
microsecond counts as much as one of a second, and outliers of a noisy machine count little (soft L1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace

import numpy as np

from attnopt.cost.efficiency import Efficiency
from attnopt.cost.phase import Features, Phase, features, priced
from attnopt.cost.target import Target

# name -> least, first guess, most
RANGES = {
    "products": (0.02, 0.6, 1.0),
    "scores": (0.002, 0.1, 1.0),
    "memory": (0.02, 0.6, 1.0),
    "launch": (1e-7, 5e-6, 1e-2),
    "ramp": (0.01, 4.0, 200.0),
    "overlap": (0.001, 0.1, 1.0),
}
PULL = 0.02  # what no point decides stays near the first guess
FEWEST = 6  # points of a family, below which its numbers say nothing


@dataclass(frozen=True)
class Sample:
    """What a kernel does at a point, the type of its products, and the seconds that it took."""

    passes: tuple[Phase, ...]
    dtype: str
    seconds: float


def fit(samples: Sequence[Sample], target: Target) -> dict[str, Efficiency]:
    """The efficiency of every family that occurs in enough samples. The target's rates are known. Deterministic."""
    from scipy.optimize import least_squares

    if not samples:
        return {}
    passes = [p for s in samples for p in s.passes]
    rows = [features(p, s.dtype, target) for s in samples for p in s.passes]
    held = Features(*(np.array([getattr(r, f.name) for r in rows]) for f in fields(Features)))
    owner = np.repeat(np.arange(len(samples)), [len(s.passes) for s in samples])
    families = sorted({p.family for p in passes})
    family = np.array([families.index(p.family) for p in passes])
    wanted = np.log([s.seconds for s in samples])
    least, guess, most = (np.tile(np.log([RANGES[name][i] for name in RANGES]), len(families)) for i in range(3))

    def distance(logarithms: np.ndarray) -> np.ndarray:
        shares = np.exp(logarithms).reshape(len(families), len(RANGES))[family].T
        spent = priced(held, SimpleNamespace(**dict(zip(RANGES, shares, strict=True))), target.launch).total
        apart = np.log(np.bincount(owner, weights=spent, minlength=len(samples))) - wanted
        return np.concatenate([apart, PULL * (logarithms - guess)])

    found = np.exp(least_squares(distance, guess, bounds=(least, most), loss="soft_l1", f_scale=0.1).x)
    counts = {name: len({o for o, f in zip(owner, family, strict=True) if families[f] == name}) for name in families}
    table = found.reshape(len(families), len(RANGES))
    return {
        name: Efficiency(**{key: float(min(value, RANGES[key][2])) for key, value in zip(RANGES, numbers, strict=True)})
        for name, numbers in zip(families, table, strict=True)
        if counts[name] >= FEWEST
    }
