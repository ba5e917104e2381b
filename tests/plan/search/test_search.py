"""The search: holds its budget on data held back, tightens where losses do not add up, repeats itself, and goes on where it stopped."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from plan_fakes import Off, clock
from small_searches import layers, setting

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.store import Store
from attnopt.passes import Candidate, DynamicInt8, Gptq
from attnopt.plan.budgeted import UNSEEN, prepared, under_budget
from attnopt.plan.judge.judge import Judge
from attnopt.plan.judge.quality import Loss
from attnopt.plan.options.proposals import LATE
from attnopt.plan.search.effort import EFFORTS, effort_named


@pytest.fixture(scope="module")
def host():
    return layers()


def test_more_budget_takes_more(host):
    counts, losses = [], []
    for budget in (0.5, 0.02, 0.008, 1e-6):
        outcome = under_budget(setting(host, budget, (DynamicInt8(),)))
        counts.append(len(outcome.moves))
        if outcome.moves:
            assert outcome.search.loss <= outcome.search.bound <= budget
            losses.append(outcome.search.loss)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 6 and 0 < counts[2] < 6 and counts[3] == 0
    assert losses == sorted(losses, reverse=True)


def test_a_budget_that_nothing_meets_is_the_exact_plan(host):
    asked = setting(host, 1e-6, (DynamicInt8(),))
    outcome = under_budget(asked)
    assert outcome.host is asked.current
    assert outcome.notes[-1].startswith("no approximate plan that saves anything is within the budget 1e-06")
    assert "the plan is exact" in outcome.notes[-1]
    for group in outcome.search.groups:
        assert group.taken == "as it is"
        assert all("over the budget 1e-06" in o.why for o in group.options)
    (rewrite,) = outcome.rewrites
    assert not rewrite.kept


def test_every_option_has_a_reason(host):
    outcome = under_budget(setting(host, 0.01, (DynamicInt8(),)))
    options = [o for g in outcome.search.groups for o in g.options]
    assert all(o.why for o in options)
    assert any(o.taken and o.why.startswith("taken: holds the budget, alone loses relative error") for o in options)
    assert any("the budget saves more elsewhere" in o.why for o in options if not o.taken)
    assert all(not o.estimated and o.loss > 0 for o in options)
    assert outcome.search.samples == (16, 16)
    assert outcome.search.peak_memory >= 0 and outcome.search.measurements > 6


def test_losses_that_grow_faster_than_their_sum_are_tightened(host):
    """Each of six makes the output off by 5 %: squares predict 12.2 % for all, the product is 34 %."""
    passes = tuple(Off((0.05,), name=f"off {i}") for i in range(6))
    outcome = under_budget(setting(host, 0.18, passes))
    assert len(outcome.moves) == 3
    assert outcome.search.loss == pytest.approx(1.05**3 - 1, rel=1e-3)
    assert len(under_budget(setting(host, 0.35, passes)).moves) == 6


@dataclass(frozen=True)
class Squared(Off):
    """y + share * y^2: what it loses grows with its input, and is small on small ones."""

    name: str = "squared"

    def apply(self, candidate: Candidate, group):
        output = group.host.graph.outputs[0]
        builder = group.host.builder(output.producer)
        again = builder.emit(output.producer.op, *output.producer.inputs, shape=output.shape, dtype=output.dtype)
        square = builder.emit("mul", again, again, shape=output.shape, dtype=output.dtype)
        share = builder.constant(float(candidate.options["share"]), output.dtype)
        part = builder.emit("mul", square, share, shape=output.shape, dtype=output.dtype)
        group.host.replace(output, builder.emit("add", again, part, shape=output.shape, dtype=output.dtype))
        return group


def test_a_plan_that_only_held_where_it_was_chosen_is_not_handed_over(host):
    asked = setting(host, 0.05, (Squared((0.01, 0.001)),))
    search = prepared(asked)
    loss = search.losses.judge.loss
    small = search.losses.of(search.classes[0].options[1].moves).upper
    search.allowed = 2 * small
    assert loss is not None
    plan, validated = search.found()
    assert plan.picks == (1,) or plan.picks == (2,)
    large = Calibration.of(host.graph, [{"x": 10 * b["x"]} for b in asked.data.batches])
    again = replace(prepared(asked), validator=Judge(host, large, asked.budget), allowed=2 * small)
    plan, validated = again.found()
    assert plan is None or plan.picks == (2,)  # ten times the input loses ten times as much
    if plan is not None:
        assert validated.upper <= 2 * small
    assert any("tightened" in note for note in again.notes)


def test_the_same_seed_gives_the_same_plan(host):
    first, second = (under_budget(setting(host, 0.01, (DynamicInt8(),), seed=3)) for _ in range(2))
    assert [m.group.name for m in first.moves] == [m.group.name for m in second.moves]
    assert (first.search.loss, first.search.bound) == (second.search.loss, second.search.bound)


def test_without_calibration_data_it_is_said(host):
    outcome = under_budget(setting(host, 0.5, (DynamicInt8(),), data=None))
    assert (outcome.search.samples, outcome.search.bound) == ((4, 0), None)
    assert UNSEEN in outcome.notes


def test_an_interrupted_search_goes_on(host, tmp_path, monkeypatch):
    asked = setting(host, 0.01, (DynamicInt8(),), store=Store.open(tmp_path))
    real, calls = Judge.loss, []

    def stops(self, *arguments):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(0)
        return real(self, *arguments)

    monkeypatch.setattr(Judge, "loss", stops)
    with pytest.raises(KeyboardInterrupt):
        under_budget(asked)
    monkeypatch.setattr(Judge, "loss", real)
    outcome = under_budget(asked)
    assert outcome.search.remembered == 4
    whole = under_budget(setting(host, 0.01, (DynamicInt8(),)))
    assert (outcome.search.loss, outcome.search.bound) == (whole.search.loss, whole.search.bound)


def test_a_full_disk_ends_no_search_and_is_said(host, tmp_path):
    """The folder that goes away stands in for the end of the disk: every write fails."""
    (tmp_path / "kept").mkdir()
    store = Store.open(tmp_path / "kept")
    (tmp_path / "kept").rmdir()
    outcome = under_budget(setting(host, 0.01, (DynamicInt8(),), store=store))
    assert any(note.startswith("a measurement was not kept in ") for note in outcome.notes)
    assert outcome.search.bound <= 0.01


def test_proposing_has_its_share_of_the_time_and_what_is_left_out_is_said(host):
    """A share of nothing: no pass sees evidence."""
    short = replace(EFFORTS["low"], proposing=0.0)
    outcome = under_budget(setting(host, 0.5, (DynamicInt8(), Gptq()), effort=short))
    kinds = {o.kind for g in outcome.search.groups for o in g.options}
    assert kinds == {"dynamic-int8: int8"}
    assert f"gptq: {LATE}" in outcome.notes
    (_, gptq) = outcome.rewrites
    assert gptq.why == f"{LATE}: GPTQ needs calibration data"


def test_a_step_that_is_not_faster_is_undone(host, monkeypatch):
    """The clock says that every model takes as long as the exact one."""
    asked = setting(host, 0.5, (DynamicInt8(),), select="measure")
    monkeypatch.setattr("attnopt.plan.timing.stepwise.in_turn", clock({"before": 1.0, "after": 0.5}))
    outcome = under_budget(asked)
    assert len(outcome.moves) == 6
    assert [(s.kept, s.groups) for s in outcome.search.steps] == [(True, 6)]
    faster = iter([{"before": 1.0, "after": 0.5}] * 2)
    monkeypatch.setattr(
        "attnopt.plan.timing.stepwise.in_turn",
        lambda calls, **kw: clock(next(faster, {"before": 1.0, "after": 1.1}))(calls, **kw),
    )
    outcome = under_budget(asked)
    assert outcome.moves == ()
    assert outcome.host is asked.current
    *checked, other = outcome.search.steps
    assert [s.groups for s in checked] == [1] * 6
    assert all(not s.kept and s.why.endswith("undone, it is not faster") for s in checked)
    assert (other.kind, other.groups, other.kept) == (
        "dynamic-int8: int8 smoothed",
        6,
        False,
    )  # tried for the groups that are left
    assert other.why.startswith("to make the model smaller") and other.why.endswith("it is slower")
    assert all("measured 0.91x" in g.options[0].why and "undone" in g.options[0].why for g in outcome.search.groups)


def test_when_time_is_up_what_was_not_measured_is_predicted_from_its_kind(host):
    """No second to measure options alone: all are told by their share of the whole, and the plan is measured all the same."""
    outcome = under_budget(setting(host, 0.02, (DynamicInt8(),), effort=replace(EFFORTS["low"], seconds=-1.0)))
    assert all(o.estimated for g in outcome.search.groups for o in g.options)
    assert "time was up" in outcome.notes[0]
    assert outcome.search.loss is None or outcome.search.bound <= 0.02


def test_efforts():
    assert [e.seconds for e in EFFORTS.values()] == sorted(e.seconds for e in EFFORTS.values())
    assert effort_named("high").rounds > effort_named("low").rounds


def test_of_plans_that_were_timed_as_fast_the_one_that_loses_least_is_best(host):
    search = prepared(setting(host, 0.5, (DynamicInt8(),)))
    search.goal = "time"
    losses = {(1, 1, 0, 0, 0, 0): 0.2, (0, 1, 1, 0, 0, 0): 0.1, (0, 0, 0, 1, 0, 0): 0.05}
    search.tried = {picks: Loss("kl", x, x, 4) for picks, x in losses.items()}
    search.measured = dict(zip(losses, (1.0, 0.99, 0.5), strict=True))
    search.noise = 0.02
    assert [p.loss.mean for p in search.holding(0.5)] == [0.1, 0.2, 0.05]
    search.noise = 0.005
    assert [p.loss.mean for p in search.holding(0.5)] == [0.2, 0.1, 0.05]
