"""Budgets that mean something, and what is said of those that do not."""

from __future__ import annotations

import pytest

import attnopt
from attnopt.errors import BudgetError
from attnopt.plan.judge.budget import Budget


@pytest.mark.parametrize(
    ("given", "metric", "allowed", "text"),
    [
        (Budget.of(0.01), "natural", 0.01, "0.01"),
        (Budget.of(0), "natural", 0.0, "0"),
        (Budget.of(Budget(metric="kl", limit=0.02)), "kl", 0.02, "kl 0.02"),
        (Budget(metric="quality", drop=0.005), "quality", 0.005, "quality 0.005"),
        (Budget(), "natural", 0.0, "0"),
        (Budget(metric="relative", limit=1), "relative", 1.0, "relative 1"),
    ],
)
def test_budgets(given, metric, allowed, text):
    assert (given.metric, given.allowed, str(given), given.exact) == (metric, allowed, text, allowed == 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"limit": -0.1}, "budget -0.1 is not a number of at least 0"),
        ({"limit": float("nan")}, "budget nan is not"),
        ({"limit": float("inf")}, "budget inf is not"),
        ({"limit": "0.1"}, "budget '0.1' is not"),
        ({"limit": True}, "budget True is not"),
        ({"metric": "kl"}, "budget None is not a number of at least 0 .limit."),
        ({"metric": "quality"}, "budget None is not a number of at least 0 .drop."),
        ({"metric": "quality", "limit": 0.1}, "a budget in quality has a drop, not a limit"),
        ({"metric": "kl", "drop": 0.1}, "a budget in kl has a limit, not a drop"),
        ({"drop": 0.1}, "a budget in natural has a limit, not a drop"),
        ({"metric": "KL", "limit": 0.1}, "metric='KL' is none of natural, kl, cosine, relative, quality"),
    ],
)
def test_what_means_nothing(arguments, says):
    with pytest.raises(BudgetError, match=says) as raised:
        Budget(**arguments)
    assert raised.value.next_move


def test_it_is_public():
    assert attnopt.Budget is Budget
