"""The roofline of one pass, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toy_target import FULL, TOY

from attnopt.cost.phase import Phase, features, priced, waves


def seconds(phase, **shares):
    efficiency = replace(FULL, **shares)
    return priced(features(phase, "float32", TOY), efficiency, TOY.launch).total


def test_the_longer_of_computing_and_moving_bounds():
    assert seconds(Phase("a", "x", flops=1e6, bytes=1e5, working_set=1e5)) == pytest.approx(1e-6 + 1e-3)
    assert seconds(Phase("a", "x", flops=1e4, bytes=1e6, working_set=1e6)) == pytest.approx(1e-6 + 1e-3)
    assert seconds(Phase("a", "x", flops=1e6, bytes=1e6, working_set=1e6), overlap=0.0) == pytest.approx(1e-6 + 2e-3)
    assert seconds(Phase("a", "x", flops=1e6, operations=1e6)) == pytest.approx(1e-6 + 2e-3)
    assert seconds(Phase("a", "x", launches=3)) == pytest.approx(3e-6)


def test_shares_divide():
    phase = Phase("a", "x", flops=1e6)
    assert seconds(phase, products=0.5, launch=4e-6) == pytest.approx(5e-6 + 2e-3)
    assert seconds(replace(phase, rows=8), ramp=8.0) == pytest.approx(1e-6 + 2e-3)  # as many rows as half of the rate takes
    assert seconds(Phase("a", "x", operations=1e6), scores=0.1) == pytest.approx(1e-6 + 1e-2)
    assert seconds(Phase("a", "x", bytes=1e6, working_set=1e6), memory=0.25) == pytest.approx(1e-6 + 4e-3)


def test_what_fits_the_cache_moves_faster():
    assert seconds(Phase("a", "x", bytes=1e6, working_set=1000)) == pytest.approx(1e-6 + 1e-4)
    assert seconds(Phase("a", "x", bytes=1e6, working_set=2000)) == pytest.approx(1e-6 + 1e-3)
    twice = Phase("a", "x", bytes=1e6, working_set=2000, rereads=1e6, rereads_set=1000)
    assert seconds(twice) == pytest.approx(1e-6 + 1e-3 + 1e-4)


def test_a_last_wave_leaves_units_idle():
    assert [waves(n, 4) for n in (1, 4, 5, 8, 0)] == [4.0, 1.0, 1.6, 1.0, 1.0]
    assert seconds(Phase("a", "x", flops=1e6, tasks=5)) == pytest.approx(1e-6 + 1.6e-3)
    assert seconds(Phase("a", "x", flops=1e6, tasks=4)) == pytest.approx(1e-6 + 1e-3)


def test_a_type_without_a_rate_is_computed_in_float32():
    assert TOY.rate("float64") == TOY.rate("float32") == 1e9
    narrow = Phase("a", "x", flops=4e6, dtype="int8")
    assert seconds(narrow) == pytest.approx(1e-6 + 1e-3)
