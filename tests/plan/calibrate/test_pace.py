"""Seconds at full speed: what slows everything alike is not taken for the kernel."""

from __future__ import annotations

import pytest

from attnopt.plan.calibrate import pace as module
from attnopt.plan.calibrate.pace import Pace


class Machine:
    """A clock that work moves; at the moment everything takes `slow` times as long."""

    def __init__(self):
        self.now, self.slow = 0.0, 1.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds * self.slow


@pytest.mark.parametrize("slow", [1.0, 1.7])
def test_a_slower_moment_is_not_counted(slow):
    machine = Machine()
    pace = Pace(2e-4, lambda: machine.work(2e-4), machine)
    machine.slow = slow
    assert pace.times({"kernel": lambda: machine.work(1e-3)}, 0.001) == {"kernel": pytest.approx(1e-3)}
    assert pace.times({}, 0.001) == {}


def test_full_speed_is_what_the_fastest_runs_take(monkeypatch):
    told = iter([0.0, 1.0] * 1 + [x for i in range(400) for x in (float(i), i + (0.5 if i % 5 == 0 else 3.0))])
    monkeypatch.setattr(module.time, "perf_counter", iter(range(200)).__next__)
    assert Pace.found(lambda: next(told), settle=40).seconds == 0.5
