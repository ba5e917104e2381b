"""How the benchmark of budgets compares a choice made by hand with a frontier: losses and runs pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
from budget_judged import Measured, compared, interval, loses_no_more

ROUGH = np.random.default_rng(0).uniform(0.9, 1.1, 28)


def model(name, loss, share, budget=None, losses=None):
    each = tuple(losses if losses is not None else loss * ROUGH)
    return Measured(name, budget, float(np.mean(each)), 0.0, 0.0, 0.0, None, share, share, share, share, "", each, (share,) * 24)


PLANS = [model("budget 0", 0.0, 0.98, 0.0), model("budget 0.001", 8e-4, 0.8, 0.001), model("budget 0.1", 0.05, 0.5, 0.1)]


def test_the_fastest_plan_that_loses_no_more():
    found = compared(model("int8", 9e-4, 0.9), PLANS)
    assert (found.plan, found.behind, found.verdict) == ("budget 0.001", False, "no, 1.12x as fast")
    assert compared(model("window", 0.2, 0.6), PLANS).plan == "budget 0.1"


def test_a_tie_is_not_behind_and_more_is():
    assert compared(model("int8", 9e-4, 0.79), PLANS).verdict == "no, as fast"
    found = compared(model("int8", 9e-4, 0.7), PLANS)
    assert found.behind and found.verdict == "**yes**, 1.14x the time"


def test_what_loses_more_than_any_budget_is_beyond():
    found = compared(model("pruned", 0.4, 0.3), PLANS)
    assert not found.behind
    assert found.verdict == "1.67x the time; it loses more than the largest budget"


def test_a_loss_that_is_not_surely_more_is_no_more():
    plan, choice = PLANS[1], model("choice", 0.0, 0.7, losses=8e-4 * ROUGH[::-1])
    assert loses_no_more(plan, choice) and loses_no_more(choice, plan)
    assert not loses_no_more(plan, model("less", 4e-4, 0.7))


def test_an_interval_holds_the_statistic():
    low, high = interval(ROUGH, np.mean)
    assert low < ROUGH.mean() < high
    assert interval([2.0] * 5, np.median) == pytest.approx((2.0, 2.0))
