"""The stopwatch: savings are shares of one reference, so that a machine that slows down does not make later plans look better."""

from __future__ import annotations

import pytest
from plan_fakes import clock

from attnopt.plan.effort import EFFORTS, Spent
from attnopt.plan.stepwise import Stopwatch


def test_a_machine_that_slows_down_saves_nothing_more(monkeypatch):
    seconds = iter([{"before": 1.0, "after": 0.8}, {"before": 10.0, "after": 8.0}, {"before": 2.0, "after": 3.0}])
    monkeypatch.setattr("attnopt.plan.stepwise.in_turn", lambda calls, **kw: clock(next(seconds))(calls, **kw))

    class Built:
        def runner(self):
            return lambda inputs: []

    watch = Stopwatch(lambda inputs: [], {}, Spent(EFFORTS["low"]))
    saved = watch.saved({"first": (), "same": (), "slower": ()}, lambda moves: Built())
    assert saved == pytest.approx({"first": 0.2, "same": 0.2, "slower": -0.5})
    assert watch.spent.measurements == 6
