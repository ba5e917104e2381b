"""Batches that fit, and what happens to measurements that do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hosts.onnx import small_models
from onnx import helper
from plan_fakes import Off

from attnopt.analysis.calibration import Calibration
from attnopt.cost.target import load_target
from attnopt.hosts.onnx import OnnxHost
from attnopt.plan.budgeted import Setting, under_budget
from attnopt.plan.judge.budget import Budget
from attnopt.plan.memory import resident
from attnopt.plan.memory.room import Room
from attnopt.plan.search.effort import EFFORTS, Spent

WIDTH, SAMPLES = 256, 64


@pytest.fixture(scope="module")
def host():
    """y = relu(x W) on batches of 64 rows: 256 KB of weights, 64 KB for each tensor of rows."""
    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], name="layer"), helper.make_node("Relu", ["m"], ["y"], name="relu")]
    return OnnxHost.from_model(small_models.model(nodes, [small_models.value("x", ["n", WIDTH])], ["y"], {"w": weight}))


def data(host, batches=4):
    made = [{"x": torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(i))} for i in range(batches)]
    return Calibration.of(host.graph, made)


def room(host, monkeypatch, left) -> Room:
    """With so many bytes left of what may be held."""
    monkeypatch.setattr(resident, "machine", lambda: 2_000_000_000)
    monkeypatch.setattr(resident, "held", lambda: 1_000_000_000 - left)
    return Room(host.graph, (), Spent(EFFORTS["low"]))


def test_what_one_measurement_takes(host, monkeypatch):
    assert room(host, monkeypatch, 10**9).needs(data(host)) == 4 * (WIDTH * WIDTH + 2 * SAMPLES * WIDTH)


@pytest.mark.parametrize(("left", "size"), [(10**9, 64), (800_000, 64), (700_000, 32), (550_000, 4), (100, 1)])
def test_batches_are_cut_until_they_fit(host, monkeypatch, left, size):
    given, here = data(host), room(host, monkeypatch, left)
    made = here.in_pieces(given)
    assert {made.size(b) for b in made.batches} == {size} and made.samples == given.samples
    assert torch.equal(torch.cat([b["x"] for b in made.batches]), torch.cat([b["x"] for b in given.batches]))
    assert (made is given) == (size == 64) and len(here.notes) == (size < 64)
    if size == 32:
        assert here.notes == ["batches of 64 samples were cut to 32: the search may hold 0.931 GiB"]


def test_what_is_kept_is_a_share_of_what_is_left(host, monkeypatch):
    assert room(host, monkeypatch, 8_000).share(10**6) == 1_000
    assert room(host, monkeypatch, 10**9).share(10**6) == 10**6
    monkeypatch.setattr(resident, "machine", lambda: 0)  # a system that does not tell
    unknown = Room(host.graph, (), Spent(EFFORTS["low"]))
    assert unknown.share(10**6) == 10**6 and unknown.in_pieces(given := data(host)) is given


def setting(host, effort):
    inputs = data(host).batches[0]
    return Setting(
        host=host, current=host, sites=(), chosen=(), passes=(Off((0.01,)), Off((0.02,), name="more")), inputs=inputs,
        data=data(host), budget=Budget.of(0.1), target=load_target("cpu")[0], runtime="onnxruntime", opset=host.opset,
        select="always", effort=effort,
    )  # fmt: skip


def test_a_search_without_memory_measures_nothing_and_says_so(host):
    effort = replace(EFFORTS["low"], memory=1e-9)
    outcome = under_budget(setting(host, effort))
    assert outcome.moves == () and outcome.search.memory_limit < 1000 < outcome.search.peak_memory
    whys = [o.why for g in outcome.search.groups for o in g.options]
    assert len(whys) == 2 and all("did not run: it takes about" in why and "is passed" in why for why in whys)
    assert "2 of 2 options were not measured alone" in " ".join(outcome.notes)


def test_a_search_with_enough_reports_what_it_held(host):
    outcome = under_budget(setting(host, EFFORTS["low"]))
    assert len(outcome.moves) == 2
    assert outcome.search.peak_memory > 0 and outcome.search.memory_limit > 0
    assert not any("memory" in note or "GiB" in note for note in outcome.notes)
