"""Coarse plans: whole kinds together, the best for a budget measured, whatever little else is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_fakes import Off
from small_searches import layers, setting

from attnopt.passes import DynamicInt8
from attnopt.plan.budgeted import prepared
from attnopt.plan.search.coarse import best_kinds, measure_coarse, rivals, together
from attnopt.plan.search.effort import EFFORTS
from attnopt.plan.search.survey import measure


@pytest.fixture(scope="module")
def search():
    """int8 of six layers, and an output that is off by 1 % or 5 %; no time to measure any option alone."""
    made = prepared(setting(layers(), 0.5, (DynamicInt8(), Off((0.01, 0.05)))))
    made.effort = made.spent.effort = replace(EFFORTS["low"], seconds=-1.0)
    measure(made)
    return made


def test_kinds_whose_losses_add_up_to_no_more(search):
    int8, smoothed, small, large = search.kinds
    losses = {kind: search.everywhere[kind].mean ** 2 for kind in search.kinds}
    everything = best_kinds(search, 0.5, 1.0)
    assert len(everything) == 2 and everything[0] in (int8, smoothed) and everything[1] in (small, large)
    tight = 1.001 * (min(losses[int8], losses[smoothed]) + losses[small]) ** 0.5
    assert set(best_kinds(search, tight, 1.0)) <= {int8, smoothed, small}
    assert best_kinds(search, 1e-9, 1.0) == []
    assert len(best_kinds(search, 0.5, 1e6)) == 0


def test_alternatives_are_not_combined(search):
    int8, smoothed, small, large = search.kinds
    assert rivals(search, int8, smoothed) and rivals(search, small, large)
    assert not rivals(search, int8, small)
    picks = together(search, [int8, small])
    assert len(picks) == 7 and all(picks)


def test_the_best_is_measured_and_found_when_there_was_no_time(search):
    before = search.spent.measurements
    measure_coarse(search, 0.5)
    assert search.spent.measurements == before + 1
    (picks,) = search.tried
    assert all(picks)
    measure_coarse(search, 0.5)
    assert search.spent.measurements == before + 1
    assert picks in [p.picks for p in search.holding(0.5)]


def test_one_that_loses_more_than_predicted_is_followed_by_a_smaller(search):
    """Measured alone both hold a budget that together they pass by a little."""
    fresh = replace(search, tried={})
    kinds = best_kinds(fresh, 0.5, 1.0)
    measure_coarse(fresh, 0.5)
    (loss,) = fresh.tried.values()
    predicted = sum(fresh.everywhere[k].mean ** 2 for k in kinds) ** 0.5
    between = (predicted + loss.upper) / 2
    fresh = replace(search, tried={})
    assert predicted < between < loss.upper
    measure_coarse(fresh, between)
    assert len(fresh.tried) == 2 or len(best_kinds(fresh, between, (loss.upper / predicted) ** 2)) < 2
