"""What is measured before a plan is chosen: something of every kind and option first, more while time lasts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from plan_fakes import Off, clock
from small_searches import layers, setting

from attnopt.passes import DynamicInt8
from attnopt.plan.budgeted import prepared
from attnopt.plan.judge.quality import Loss
from attnopt.plan.search.effort import EFFORTS, Spent
from attnopt.plan.search.survey import FEW, combined_far, in_turns, measure


@dataclass(frozen=True)
class Plain(DynamicInt8):
    """Without smoothing: one kind for six layers."""

    def propose(self, group, evidence):
        return super().propose(group, None)


class Counted(Spent):
    """A second for each measurement."""

    @property
    def seconds(self) -> float:
        return float(self.measurements)


@pytest.fixture(scope="module")
def host():
    return layers()


@pytest.fixture
def measured(host, monkeypatch):
    """A search that has measured for so many seconds."""

    def search(seconds, passes=(Plain(),), budget=0.5, **changes):
        monkeypatch.setattr("attnopt.plan.timing.stepwise.in_turn", clock({"before": 1.0, "after": 0.5}))
        asked = setting(host, budget, passes, effort=replace(EFFORTS["low"], seconds=seconds), **{"select": "measure"} | changes)
        made = prepared(asked)
        made.spent = made.losses.spent = Counted(asked.effort)
        if made.stopwatch is not None:
            made.stopwatch.spent = made.spent
        measure(made)
        return made

    return search


def test_where_time_lasts_all_is_measured_on_all_samples(measured):
    search = measured(100.0)
    assert [loss.samples for loss in search.alone.values()] == [16] * 6
    assert [t.saved for t in search.prices.timed.values()] == [0.5]
    assert search.notes == []


def test_little_time_is_split_between_losses_and_times(measured):
    """Five seconds: one for the kind, half of the rest for options on the few samples of one batch, and then the time of the kind."""
    search = measured(5.0)
    assert [loss.samples for loss in search.alone.values()] == [FEW] * 3
    assert len(search.prices.timed) == 1
    assert search.notes == [
        "3 of 6 options were not measured alone: time was up, a higher effort has more",
        "3 of 6 options were measured alone on 4 of 16 samples",
    ]


def test_more_time_measures_again_on_all_samples(measured):
    """Eleven seconds: 1 + 6 * 1 would be over the middle, so all six are measured on few samples, the best again on all."""
    search = measured(11.0)
    assert sorted(loss.samples for loss in search.alone.values()) == [4, 4, 4, 16, 16, 16]


def test_a_first_idea_is_scaled_to_all_samples(measured):
    """What one layer loses on four samples stands to what it is said to lose as these samples of the kind everywhere do to all."""
    few = measured(11.0)
    scaled = [p for p, loss in few.alone.items() if loss.samples == FEW]
    ratio = few.everywhere[few.kinds[0]].mean * FEW / sum(few.everywhere[few.kinds[0]].values[:FEW])
    for place in scaled:
        assert few.alone[place].mean == pytest.approx(ratio * sum(few.alone[place].values) / FEW)


def test_a_kind_with_one_group_is_known_from_everywhere_and_not_timed_over_the_budget(measured):
    search = measured(100.0, (Off((0.3, 0.01)),), budget=0.1)
    assert {p: loss.mean for p, loss in search.alone.items()} == pytest.approx({(0, 1): 0.3, (0, 2): 0.01}, rel=1e-3)
    assert search.losses.spent.measurements == 2 + 2
    assert list(search.prices.timed) == [("off: off 0.01", "")]
    assert search.notes == ["1 of 2 kinds were not timed: one of them alone is over the budget"]


def test_without_a_clock_all_time_is_for_losses(measured):
    search = measured(7.0, select="model")
    assert search.prices.timed == {} and len(search.alone) == 6


def test_one_kind_tells_where_another_hurts(host, measured):
    """Time for six of the twelve options: those of one kind, and the other's losses are spread over the layers as these are."""
    search = measured(13.0, (DynamicInt8(),))
    kinds = {search.classes[g].options[i].kind for g, i in search.alone}
    (known,), (other,) = kinds, set(search.kinds) - kinds
    predicted = {}
    for g, each in enumerate(search.classes):
        for i, option in enumerate(each.options):
            predicted.setdefault(option.kind, {})[g] = search.predicted((g, i))
    assert sum(predicted[other].values()) == pytest.approx(search.losses.additive(search.everywhere[other].mean))
    whole = sum(predicted[known].values())
    for g, loss in predicted[other].items():
        assert loss / sum(predicted[other].values()) == pytest.approx(predicted[known][g] / whole)
    assert search.notes[0] == "6 of 12 options were not measured alone: time was up, a higher effort has more"


def test_kinds_are_bounded_by_time_too(measured):
    """Five seconds, one for each kind: four on all samples, two on few, and three not at all."""
    search = measured(5.0, tuple(Off((0.01 * i,), name=f"off {i}") for i in range(1, 10)))
    samples = [loss.samples for loss in search.everywhere.values()]
    assert {n: samples.count(n) for n in (16, FEW, 0)} == {16: 4, FEW: 2, 0: 3}
    assert search.notes[:2] == [
        "3 of 9 kinds were not measured: time was up, a higher effort has more",
        "the times of 2 of 6 kinds are predicted: time was up",
    ]


def test_what_combines_a_kind_far_over_the_budget_is_not_measured():
    """It loses about what its parts lose together, and that is too much already."""
    metric = SimpleNamespace(name="mean KL")
    search = SimpleNamespace(
        parts={"drop": ("drop",), "drop + window": ("drop", "window"), "int8 + window": ("int8", "window")},
        everywhere={"drop": Loss("mean KL", 0.5, 0.6, 4), "window": Loss("mean KL", 0.002, 0.003, 16)},
        losses=SimpleNamespace(additive=lambda x: x, total=lambda x: x, judge=SimpleNamespace(metric=metric)),
        allowed=0.01,
    )
    assert combined_far(search, "drop + window").mean == pytest.approx(0.502)
    assert combined_far(search, "drop") is combined_far(search, "int8 + window") is None


def test_one_kind_of_each_pass_comes_before_the_second_of_any():
    """int8 is predicted to cost time, and may be wrong alike for all its kinds: still one of them is timed early."""
    worth = {"window 64": 9.0, "window 128": 8.0, "window 256": 7.0, "int8": -2.0, "int8 smoothed": -3.0}
    search = SimpleNamespace(whole=lambda kind: kind, total_worth=worth.get, passes_of=lambda kind: (kind.split()[0],))
    assert in_turns(search, worth) == ["window 64", "int8", "window 128", "int8 smoothed", "window 256"]
