"""Callables run in turn, as often as asked, and ratios are of neighbours."""

from __future__ import annotations

import time

import pytest

from attnopt.plan.timing.timing import Timing, in_turn


def test_callables_run_in_turn_after_a_warm_up():
    calls: list[str] = []
    times = in_turn({name: (lambda name=name: calls.append(name)) for name in "abc"}, seconds=0.0, least=4)
    assert calls == list("abc") * (1 + 1 + 4)  # a warm-up, a round that tells how long one takes, four that count
    assert [len(times[name].runs) for name in "abc"] == [4, 4, 4]


def test_no_more_rounds_than_asked():
    times = in_turn({"a": lambda: None}, seconds=0.05, most=7)
    assert len(times["a"].runs) == 7


def test_long_rounds_are_few(monkeypatch):
    monkeypatch.setattr("attnopt.plan.timing.timing.LONG", 0.05)
    assert len(in_turn({"a": lambda: time.sleep(0.06)}, seconds=0.0)["a"].runs) == 3
    assert len(in_turn({"a": lambda: None}, seconds=0.0)["a"].runs) == 5


def test_a_clock_that_stands_still_for_a_run_is_no_division_by_zero():
    ticks = iter([0.0, 0.0, *(float(i) for i in range(1, 100))])
    times = in_turn({"a": lambda: None, "b": lambda: None}, seconds=0.0, clock=lambda: next(ticks))
    assert times["b"].ratio(times["a"]) == 1.0


def test_what_is_measured():
    times = in_turn({"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.01)}, seconds=0.0)
    assert times["short"].median >= 0.001
    assert times["long"].median >= 0.01


def test_ratios_are_of_pairs():
    """The machine became ten times slower halfway: the medians say nothing, the pairs say 2."""
    before, after = Timing((1.0, 1.0, 10.0, 10.0, 10.0)), Timing((2.0, 2.0, 20.0, 20.0, 2.0))
    assert after.ratio(before) == 2.0
    assert (before.median, after.median) == (10.0, 2.0)
    with pytest.raises(ValueError):
        after.ratio(Timing((1.0,)))
