"""The sweep: each budget holds on data held back, times are shares of the original's and never rise, and falling back is said."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import folded_models
import pytest
from plan_fakes import clock
from small_searches import layers, setting

from attnopt.analysis.calibration import Calibration
from attnopt.passes import DynamicInt8, MeanPooling, PackProjections
from attnopt.plan.budgeted import prepared
from attnopt.plan.frontier import explored, natural
from attnopt.plan.judge.budget import Budget
from attnopt.plan.judge.judge import Judge
from attnopt.plan.pipeline import Request, exact_setting, run

BUDGETS = (1e-6, 0.008, 0.02, 0.5)


@pytest.fixture(scope="module")
def host():
    return layers()


@pytest.fixture
def timed(monkeypatch):
    """Every model takes half of the time of what it is beside; given seconds, one after the other."""

    def at(*seconds):
        told = iter(seconds)
        monkeypatch.setattr(
            "attnopt.plan.timing.stepwise.in_turn",
            lambda calls, **kw: clock({"before": 2.0, "after": next(told, 1.0)})(calls, **kw),
        )

    return at


def of_goal(frontier, goal):
    return sorted((p for p in frontier.points if p.goal == goal), key=lambda p: p.budget)


def test_each_budget_has_a_point_that_holds_it(host, timed):
    timed()
    frontier = explored(setting(host, 0.5, (DynamicInt8(),), select="measure"), "layers", BUDGETS)
    assert frontier.points[0].name == "exact" and frontier.original == 2.0
    for goal in ("time", "memory"):
        points = of_goal(frontier, goal)
        assert [p.budget for p in points] == list(BUDGETS)
        assert all(p.loss <= p.bound <= p.budget == p.plan.budget for p in points)
        assert all(p.plan.bound == p.bound for p in points)
        assert all(b.seconds <= a.seconds for a, b in pairwise(points)) or goal == "memory"
        assert all(b.weights <= a.weights for a, b in pairwise(points)) or goal == "time"
    assert of_goal(frontier, "memory")[0].plan.steps == ()
    assert of_goal(frontier, "memory")[0].note == "as 'exact': no plan of its own held"
    assert len(of_goal(frontier, "memory")[3].plan.steps) == 6
    everywhere = [p.name for p in frontier.points if p.budget is None and p.name != "exact"]
    assert sorted(everywhere) == ["dynamic-int8: int8 everywhere", "dynamic-int8: int8 smoothed everywhere"]


def test_all_times_are_shares_of_one_original(host, timed):
    timed(0.5, 0.5, 1.8)  # two kinds, then the exact plan; everything after takes 1.0
    frontier = explored(setting(host, 0.5, (DynamicInt8(),), select="measure"), "layers", BUDGETS)
    assert all(p.seconds == pytest.approx(p.share * frontier.original) for p in frontier.points)
    assert frontier.points[0].share == pytest.approx(0.9)
    assert {p.share for p in frontier.points if p.plan.steps} == {0.5}


def test_a_plan_that_is_slower_than_a_smaller_budgets_is_not_its_successor(host, timed, monkeypatch):
    """More layers in int8 take longer here: every budget keeps the plan of the first that has one."""
    shares = {1: 0.3}
    real = "attnopt.plan.frontier.Bench.measured"
    monkeypatch.setattr(
        real, lambda self, picks: shares.get(sum(map(bool, picks)), 0.4 + 0.1 * sum(map(bool, picks))) if any(picks) else 1.0
    )
    timed()
    frontier = explored(setting(host, 0.5, (DynamicInt8(),), select="measure"), "layers", BUDGETS)
    points = of_goal(frontier, "time")
    assert all(b.share <= a.share for a, b in pairwise(points))
    same = [b for a, b in pairwise(points) if a.plan.steps == b.plan.steps]
    assert same and all(p.note.startswith("as '") or "; as '" in p.note for p in same)


def test_a_plan_that_does_not_hold_elsewhere_is_tightened_or_falls_back(host, timed, monkeypatch):
    """The half held back has inputs with a few much larger numbers, on which int8 loses more."""
    timed()
    asked = setting(host, 0.5, (DynamicInt8(),), select="measure")
    harsh = Calibration.of(host.graph, [{"x": b["x"] * (1 + 50 * (b["x"] > 1.5))} for b in asked.data.batches])

    def harder(given):
        made = prepared(given)
        return replace(made, validator=Judge(host, harsh, given.budget))

    monkeypatch.setattr("attnopt.plan.frontier.prepared", harder)
    frontier = explored(asked, "layers", BUDGETS)
    for goal in ("time", "memory"):
        assert all(p.bound <= p.budget for p in of_goal(frontier, goal))
    told = " ".join(p.note for p in frontier.points)
    assert "tightened" in told and "lost up to" in told


def test_without_a_clock_times_are_predicted_shares(host):
    frontier = explored(setting(host, 0.5, (DynamicInt8(),), select="model"), "layers", BUDGETS)
    assert not any(p.timed for p in frontier.points)
    assert frontier.points[0].share == pytest.approx(1.0)  # there is no attention to compute otherwise
    assert of_goal(frontier, "time")[-1].share < 1.0


def test_an_exact_plan_that_is_slower_is_the_original(host, timed):
    timed(2.0, 2.0, 2.2)
    frontier = explored(setting(host, 0.5, (DynamicInt8(),), select="measure"), "layers", BUDGETS)
    exact = frontier.points[0]
    assert (exact.share, exact.seconds, exact.plan.kernels) == (1.0, 2.0, {})
    assert exact.note == "its kernels take 1.10 of the original's time, which is kept"


def test_the_fastest_kinds_that_no_other_beats_have_budgets_of_their_own():
    """A kind that loses up to 0.1 where it was chosen and 0.12 elsewhere holds 0.121; one over the largest budget has none."""
    known = {"fast": (0.12, 0.5), "slow": (0.01, 0.9), "beaten": (0.02, 0.95), "slower": (0.001, 1.1), "large": (0.6, 0.2)}
    whole = {kind: SimpleNamespace(bound=bound, loss=bound / 2, share=share) for kind, (bound, share) in known.items()}
    search = SimpleNamespace(everywhere=dict.fromkeys(known, 0.1), limit=lambda loss: loss, allowed=0.5)
    assert natural(search, whole) == [0.121, 0.101]
    search.everywhere = dict.fromkeys(known, 0.005)
    assert natural(search, whole) == [0.121, 0.0101]


class Own:
    """A model whose every call is counted."""

    def __init__(self, host):
        self.outputs, self.calls = host.runner(), 0

    def __call__(self, inputs):
        self.calls += 1


def test_folds_come_first_and_times_are_shares_of_the_given_model(monkeypatch):
    """The clock gives the folded model half of the time of the one before it, and every plan a quarter of that of its user's model."""
    monkeypatch.setattr("attnopt.plan.folding.in_turn", clock({"before": 2.0, "after": 1.0}))
    monkeypatch.setattr("attnopt.plan.timing.stepwise.in_turn", clock({"before": 2.0, "after": 0.5}))
    given = folded_models.host()
    own, passes = Own(given), (PackProjections(), MeanPooling(groups=(1,)))
    asked = Request("cpu", "torch", 0, "measure", Budget.of(1e6), passes, {"ids": folded_models.IDS}, own=own)
    frontier = explored(exact_setting(given, asked), "language", (1e6,))
    assert frontier.original == 2.0 and {p.share for p in frontier.points} == {0.25}
    assert own.calls == 2  # beside the exact plan, and beside the one that shares heads
    exact, pooled = frontier.points[0], frontier.points[-1]
    assert exact.rewrites == "pack-projections: packed (1)"
    assert [s.rewrite for s in pooled.plan.steps] == ["pack-projections", "mean-pooling"]
    for point in (exact, pooled):
        made, report = run(given, replace(asked, plan=point.plan, own=None, select="always"))
        assert made is not given and report.plan.steps == point.plan.steps
        assert (report.difference.max_rel > 0.01) == (point is pooled)


def test_without_its_own_call_the_model_before_folds_is_what_plans_are_timed_beside(monkeypatch):
    """Where nothing is timed, it is what they are predicted beside."""
    given = folded_models.host()
    asked = Request("h200", "torch", 0, "always", Budget.of(1e6), (PackProjections(),), {"ids": folded_models.IDS})
    found = exact_setting(given, asked)
    assert found.given is given and found.host is not given and [m.rewrite.name for m in found.folds] == ["pack-projections"]
    exact = explored(replace(found, select="model"), "language", (1e6,)).points[0]
    assert exact.share < 1.0 and [s.rewrite for s in exact.plan.steps] == ["pack-projections"]
    monkeypatch.setattr("attnopt.plan.timing.stepwise.in_turn", clock({"before": 2.0, "after": 2.2}))
    slower = explored(replace(found, select="measure"), "language", (1e6,)).points[0]
    assert (slower.share, slower.plan.steps, slower.rewrites) == (1.0, (), "none")
    assert slower.note == "its folds and kernels take 1.10 of the original's time, which is kept"
