"""The stopwatch: savings are shares of one reference, so that a machine that slows down does not make later plans look better."""

from __future__ import annotations

import pytest
from plan_fakes import clock

from attnopt.plan.search.effort import EFFORTS, Spent
from attnopt.plan.timing.stepwise import Stopwatch


def test_a_machine_that_slows_down_saves_nothing_more(monkeypatch):
    seconds = iter([{"before": 1.0, "after": 0.8}, {"before": 10.0, "after": 8.0}, {"before": 2.0, "after": 3.0}])
    monkeypatch.setattr("attnopt.plan.timing.stepwise.in_turn", lambda calls, **kw: clock(next(seconds))(calls, **kw))

    def run(inputs):
        return []

    watch = Stopwatch(run, [(1.0, {})], Spent(EFFORTS["low"]))
    assert [watch.saved(run) for _ in range(3)] == pytest.approx([0.2, 0.2, -0.5])
    assert watch.spent.measurements == 6


def test_several_inputs_count_by_weight(monkeypatch):
    """Half of what one input saves, and half of what the other does."""
    seconds = iter([{"before": 1.0, "after": 0.5}, {"before": 3.0, "after": 3.0}])
    monkeypatch.setattr("attnopt.plan.timing.stepwise.in_turn", lambda calls, **kw: clock(next(seconds))(calls, **kw))
    seen = []
    watch = Stopwatch(seen.append, [(0.5, {"short": 0}), (0.5, {"long": 0})], Spent(EFFORTS["low"]))
    assert watch.saved(seen.append) == pytest.approx(0.25)
    assert seen == [{"short": 0}] * 2 + [{"long": 0}] * 2
    assert watch.reference == 2.0
