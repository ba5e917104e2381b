"""Folds through the planner: taken where time is saved, made again from a plan and in an export, and gone before approximate rewrites."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from folded_models import EXPORTED, IDS, host, model, require_equal

import attnopt
from attnopt.cost.target import load_target
from attnopt.passes import Candidate, CenterStream, FoldBiases, FoldNormGain, FuseAttention, MeanPooling, PackProjections
from attnopt.plan.folding import Folding, carried, fold_steps, is_fold

INPUTS = {"ids": IDS}


def folding(select, given, runtime="torch"):
    inputs = given.example_inputs() if given.kind == "torch" else {given.graph.inputs[0].name: IDS}
    return Folding(select, load_target("h200")[0], runtime, ((1.0, inputs),), ((1.0, given.graph.sizes(inputs)),))


def test_only_exact_edits_are_folds():
    assert [is_fold(p) for p in (FuseAttention(), PackProjections(), MeanPooling())] == [False, True, False]


def test_each_fold_is_made_on_what_the_last_one_left():
    given = host(**EXPORTED)
    made = folding("always", given).of(given, (FoldNormGain(), FoldBiases(), PackProjections()))
    assert [(r.name, r.kept) for r in made.reports] == [
        ("fold-norm-gain", True),
        ("fold-biases", False),  # a bias inside of a layer costs nothing of its own in torch
        ("pack-projections", True),
    ]
    assert "nothing is saved" in made.reports[1].why and made.host is not given
    assert [s.rewrite for s in made.steps] == ["fold-norm-gain"] * 3 + ["pack-projections"]


def test_nothing_is_taken_of_what_is_predicted_to_save_little():
    given = host()
    made = folding("model", given).of(given, (CenterStream(),))
    assert made.host is given and not made.moves and [r.kept for r in made.reports] == [False]


def test_what_a_runtime_computes_in_one_kernel_is_only_measured():
    given = host("onnx")
    made = folding("model", given, "onnxruntime").of(given, (FoldNormGain(),))
    assert made.host is given and made.reports[0].why == "onnxruntime computes both in one kernel: only a measurement tells"


def test_folds_are_carried_over_to_an_export():
    given, exported = host(**EXPORTED), host("onnx")
    steps = folding("always", given).of(given, (FoldNormGain(), PackProjections())).steps
    one, other = carried(steps, given, exported)
    assert [s.rewrite for s in other.steps] == [s.rewrite for s in steps] == ["fold-norm-gain"] * 3 + ["pack-projections"]
    require_equal(one.host, given)
    require_equal(other.host, exported)


@dataclass(frozen=True)
class Broken:
    """A fold that cannot be written into this model."""

    name: str = "broken"
    exact: bool = True
    per: str = "model"

    def propose(self, group, evidence):
        return [Candidate(self.name, True, "broken", kind="broken", changes=("structure",))]

    def apply(self, candidate, group):
        raise RuntimeError("there is no such node")


def test_a_fold_that_fails_leaves_the_model_as_it_was():
    given = host()
    made = folding("always", given).of(given, (Broken(), PackProjections()))
    assert [(r.name, r.kept) for r in made.reports] == [("broken", False), ("pack-projections", True)]
    assert made.reports[0].why == "failed: RuntimeError: there is no such node"


@functools.cache
def optimized():
    return attnopt.optimize(
        model(False), INPUTS, budget=1e6, passes=["pack-projections", "mean-pooling"], select="model",
        minimise="memory", target="h200+torch",
    )  # fmt: skip


def test_approximate_rewrites_are_searched_on_the_folded_model(tmp_path):
    made = optimized()
    folds, others = fold_steps(made.plan.steps)
    assert [s.rewrite for s in folds] == ["pack-projections"] and [s.rewrite for s in others] == ["mean-pooling"]
    assert made.report.rewrites[0].name == "pack-projections" and made.report.rewrites[0].kept
    loaded = attnopt.load(made.export(tmp_path / "small.onnx"))
    torch.testing.assert_close(torch.as_tensor(loaded(IDS)[0]), made(IDS), atol=1e-4, rtol=1e-4)
    assert [s.rewrite for s in loaded.plan.steps] == ["pack-projections", "mean-pooling"]


@pytest.mark.parametrize("select", ["always", "measure"])
def test_a_plan_makes_its_folds_again(select):
    first = attnopt.optimize(model(False), INPUTS, passes=["pack-projections"], select=select)
    again = attnopt.optimize(model(False), INPUTS, plan=first.plan)
    assert again.plan.steps == first.plan.steps and (select == "measure" or first.plan.steps)
    torch.testing.assert_close(again(IDS), model(False)(IDS), atol=1e-5, rtol=1e-5)
