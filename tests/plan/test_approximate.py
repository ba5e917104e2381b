"""A candidate is kept where its measured loss is inside the budget and it gains; every try is reported."""

from __future__ import annotations

import pytest
import torch
from hosts.onnx import small_models
from plan_fakes import Off, clock

from attnopt.hosts.onnx import OnnxHost
from attnopt.plan.approximate import Evidence, approximate
from attnopt.plan.quality import METRICS


@pytest.fixture
def host():
    return OnnxHost.from_model(small_models.spelled_out())


def evidence(host, budget):
    batches = [{name: torch.randn(2, 4, length, 8) for name in "qkv"} for length in (5, 6)]
    outputs = [host.runner()(batch) for batch in batches]
    return Evidence(batches, outputs, batches[0], METRICS["relative"], budget)


def test_the_first_inside_the_budget_is_kept(host):
    judged = evidence(host, budget=0.01)
    result, tries = approximate(host, Off((0.5, 0.005, 0.001)), judged, measure=False)
    assert [(t.description, t.kept) for t in tries] == [("off by 0.5", False), ("off by 0.005", True)]
    assert [t.loss for t in tries] == pytest.approx([0.5, 0.005], rel=1e-3)
    assert tries[0].why.startswith("relative error 0.5 over the budget 0.01")
    assert tries[1].why.startswith("relative error 0.005 within the budget 0.01")
    assert all((t.name, t.metric, t.budget) == ("off", "relative error", 0.01) for t in tries)
    torch.testing.assert_close(result.runner()(judged.timed)[0], judged.outputs[0][0] * 1.005)
    torch.testing.assert_close(host.runner()(judged.timed)[0], judged.outputs[0][0])


def test_over_the_budget_nothing_changes(host):
    result, tries = approximate(host, Off((0.5, 0.02)), evidence(host, budget=0.01), measure=False)
    assert result is host
    assert [t.kept for t in tries] == [False, False]


@pytest.mark.parametrize(("seconds", "kept"), [(0.9, True), (0.98, False), (1.5, False)])
def test_a_gain_within_the_noise_is_none(monkeypatch, host, seconds, kept):
    monkeypatch.setattr("attnopt.plan.approximate.in_turn", clock({"before": 1.0, "after": seconds}))
    result, (tried,) = approximate(host, Off((0.001,)), evidence(host, budget=0.01), measure=True)
    assert (tried.kept, result is not host) == (kept, kept)
    assert (tried.seconds_before, tried.seconds_after) == (1.0, seconds)
    assert tried.why.endswith(f"{1 / seconds:.2f}x the speed" + ": no gain" * (not kept))


def test_a_pass_that_proposes_nothing(host):
    result, (tried,) = approximate(host, Off(()), evidence(host, budget=0.01), measure=False)
    assert result is host
    assert (tried.description, tried.kept, tried.why) == ("nothing proposed", False, "nothing to be off")
