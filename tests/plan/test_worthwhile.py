"""Kinds that are predicted to cost time are left out with both times; what is near, priceless, or narrows tables alone stays."""

from __future__ import annotations

import pytest
from small_searches import layers, setting

from attnopt.passes import RoundWeights
from attnopt.passes.weight_rounding import Wish
from attnopt.plan.budgeted import prepared, under_budget
from attnopt.plan.timing.pricing import Prices
from attnopt.plan.worthwhile import FAR, worthwhile

BOTH = (RoundWeights(wishes=(Wish(8, 64), Wish(4, 32))),)


@pytest.fixture
def search():
    return prepared(setting(layers(2), 0.5, BOTH))


def priced(search, **after):
    """Prices of one second for each option as it is, and of what is given for a kind by its bits."""
    made = Prices(search.losses.workshop, ())
    for each in search.classes:
        for option in each.options:
            made.known[option] = (1.0, next((t for bits, t in after.items() if bits in option.kind), 1.0))
    return made


def kinds(classes):
    return [[o.kind for o in each.options if o.moves] for each in classes]


def test_what_costs_time_is_left_out_with_both_times(search):
    left = worthwhile(search.classes, priced(search, int4=1.2 / FAR, int8=0.99 / FAR))
    assert kinds(left) == [["round-weights: int8 group 64"]] * 2
    assert all(each.options[0].moves == () for each in left)
    (name, refusal), *_ = left[0].refusals
    assert name == "round-weights"
    assert refusal.reason == "int4 group 32 everywhere is predicted to take 3.43e+03 ms where 2e+03 ms are taken now"


def test_what_has_no_price_stays(search):
    prices = priced(search)
    prices.known = dict.fromkeys(prices.known, (0.0, 1.0))
    assert kinds(worthwhile(search.classes, prices)) == kinds(search.classes)


def test_only_where_times_are_measured(monkeypatch):
    asked = []
    monkeypatch.setattr("attnopt.plan.budgeted.worthwhile", lambda classes, prices: asked.append(1) or classes)
    under_budget(setting(layers(1), 0.5, BOTH, minimise="memory"))
    assert not asked
