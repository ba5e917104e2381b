"""The benchmark of smaller attention: searches with and without tuning stand beside each other, and a run goes on with what is missing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from shrinking import planned
from shrinking.kept import Kept
from shrinking.rows import Shrunk
from shrunk_models import IDS, host

import attnopt
from attnopt.passes import MeanPooling
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import Move
from attnopt.plan.replay import step_of
from attnopt.report.frontier import Frontier, Point
from attnopt.report.plan import Plan

PLAIN, TUNED = planned.KINDS


@pytest.fixture
def subject():
    loss = SimpleNamespace(mean=0.1, half=0.01)
    return SimpleNamespace(
        name="code-lm",
        model=None,
        torch=host("turned", "torch"),
        calibration=[{"input_ids": IDS}],
        judged=[{"input_ids": IDS}],
        loss=lambda runner: (loss, runner({"input_ids": IDS})),
    )


@pytest.fixture
def asked(subject, monkeypatch):
    """How often each search was made, by whether it tunes: both find that all key heads are shared."""
    groups, told = Grouping(subject.torch).of("block"), list[bool]()
    steps = tuple(step_of(Move(MeanPooling(), g, MeanPooling().propose(g, None)[0])) for g in groups)
    plan = Plan("torch", "cpu", "torch", {}, steps)

    def explore(model, inputs, *, tune, **given):
        told.append(tune)
        return Frontier("tiny", "cpu", "kl", (Point("budget 0.1", 0.1, 0.1, 0.1, 1.0, 1.0, 1.0, "mean-pooling (2)", plan),))

    monkeypatch.setattr(attnopt, "explore", explore)
    monkeypatch.setattr(planned, "onnx_of", lambda made: host("turned", "onnx"))
    monkeypatch.setattr(planned, "ratio", lambda before, after, inputs, seconds: float(len(after.graph.nodes) > 0))
    return told


def test_each_search_has_rows_of_its_own_and_is_made_once(subject, asked):
    other = Shrunk("code-lm", "mean-pooling", "1 of 2 heads", 0.1, 0.01, 1.0, 0.5)
    kept = Kept(saves=False, rows=[other])
    planned.searched(subject, PLAIN, kept)
    (_, plain) = kept.rows
    assert (plain.method, plain.strength, plain.cache) == ("planned: mean-pooling (2)", "budget 0.1", 0.5)
    planned.searched(subject, TUNED, kept)
    planned.searched(subject, TUNED, kept)
    assert asked == [False, True]
    assert [r.method for r in kept.rows] == ["mean-pooling", plain.method, "tuned plan: mean-pooling (2)"]
    assert kept.said.keys() == {"code-lm, planner", "code-lm, planner, tuned"}


def test_an_interrupted_search_starts_anew_and_leaves_the_other_alone(subject, asked):
    kept = Kept(saves=False)
    for kind in planned.KINDS:
        planned.searched(subject, kind, kept)
    del kept.said["code-lm, planner, tuned"]
    kept.rows = [
        r if "tuned" not in r.method else Shrunk("code-lm", "tuned plan: half", "", None, None, 1.0, 1.0) for r in kept.rows
    ]
    planned.searched(subject, TUNED, kept)
    assert [r.method for r in kept.rows] == ["planned: mean-pooling (2)", "tuned plan: mean-pooling (2)"]


def test_plans_are_made_again_as_they_were(subject, asked):
    """On one look at the graph: what the planner's workshop builds, in torch and in the export."""
    (point,) = attnopt.explore(None, None, tune=False).points
    made = planned.replayed(subject.torch, point.plan.steps)
    assert made.cache == 0.5 and made.parameters < sum(p.numel() for p in subject.torch.module.parameters())
    assert not torch.equal(made.host.runner()({"input_ids": IDS})[0], subject.torch.runner()({"input_ids": IDS})[0])
