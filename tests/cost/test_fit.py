"""The fit finds the shares that made the times."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from toy_target import TOY

from attnopt.cost.efficiency import Efficiency
from attnopt.cost.fit import FEWEST, Sample, fit
from attnopt.cost.phase import Phase, features, priced

KNOWN = {
    "products": Efficiency(products=0.5, launch=2e-5, ramp=8.0, overlap=0.1),
    "passes": Efficiency(scores=0.05, memory=0.25, launch=3e-6, overlap=0.1),
}


def sample(seed, noise=0.0):
    """One product and one pass of different sizes, timed as the known shares say."""
    draw = random.Random(seed)
    flops, moved = 10 ** draw.uniform(3, 8), 10 ** draw.uniform(3, 8)
    passes = (
        Phase("a", "products", flops=flops, rows=draw.choice([1, 4, 16, 64, 256])),
        Phase("b", "passes", operations=10 ** draw.uniform(2, 6), bytes=moved, working_set=moved),
    )
    spent = sum(priced(features(p, "float32", TOY), KNOWN[p.family], TOY.launch).total for p in passes)
    return Sample(passes, "float32", spent * draw.uniform(1 - noise, 1 + noise))


def off(found, seed):
    at = sample(seed)
    spent = sum(priced(features(p, "float32", TOY), found[p.family], TOY.launch).total for p in at.passes)
    return abs(spent / at.seconds - 1)


@pytest.mark.parametrize(("noise", "allowed"), [(0.0, 0.02), (0.1, 0.1)])
def test_known_shares_are_found(noise, allowed):
    found = fit([sample(seed, noise) for seed in range(60)], TOY)
    errors = sorted(off(found, seed) for seed in range(100, 160))
    assert errors[len(errors) // 2] < allowed
    if not noise:
        assert found["products"].products == pytest.approx(0.5, rel=0.05)
        assert found["passes"].memory == pytest.approx(0.25, rel=0.05)


def test_one_wild_measurement_changes_little():
    samples = [sample(seed) for seed in range(60)]
    wild = [replace(s, seconds=s.seconds * (20 if i == 7 else 1)) for i, s in enumerate(samples)]
    assert fit(wild, TOY)["products"].products == pytest.approx(0.5, rel=0.1)


def test_it_is_deterministic_and_needs_enough():
    samples = [sample(seed, 0.1) for seed in range(20)]
    assert fit(samples, TOY) == fit(samples, TOY)
    assert fit(samples[: FEWEST - 1], TOY) == fit([], TOY) == {}
