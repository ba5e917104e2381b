"""Sparse passes on trained models under a budget: no plan loses more than it on the half of the data that validates."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_searches import setting
from torch import Tensor, nn

from attnopt.analysis.calibration import Calibration
from attnopt.codegen.operator_call import call_operator
from attnopt.codegen.triton.lowerings.triton_sparse import TritonSparse
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.reference import reference
from attnopt.ir.spec import parse
from attnopt.passes import BlockTopk, SinksWindow
from attnopt.patterns import recognise
from attnopt.plan.budgeted import halves, under_budget
from attnopt.plan.judge.judge import Judge
from attnopt.plan.options.workshop import Workshop
from attnopt.plan.search.effort import EFFORTS

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import trained_models
from recall_task import recall_batch

BUDGET, SAMPLES, LENGTH = 0.01, 32, 128
PASSES = (SinksWindow(sinks=(4,), windows=(64,)), BlockTopk(blocks=((16, 6),), rows=16))


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@torch.library.custom_op("attnopt_tests::meaning", mutates_args=())
def meaning(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    parsed = parse(spec)
    return reference(parsed, q, k, v, **dict(zip(parsed.operands, operands, strict=True))).contiguous()


@meaning.register_fake
def _(q, k, v, operands, spec):
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


class Meaning(TritonSparse):
    """What a spec means, so that no kernel has to be compiled."""

    def emit(self, site, builder):
        return call_operator(torch.ops.attnopt_tests.meaning.default, site, builder)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(Workshop, "kernel_for", lambda self, site, brief=False: Meaning())


def subject(model, tokens):
    """A host and its data, in batches of eight samples."""
    host = FxHost.from_captured(capture(Logits(model).eval(), {"input_ids": tokens[:8]}, {"input_ids": None}))
    return host, [{"input_ids": part} for part in tokens.split(8)]


@pytest.fixture(scope="module")
def recall():
    return subject(trained_models.recall_model(), recall_batch(SAMPLES, 16, LENGTH - 64, 0).tokens)


def require_within_budget(host, batches, seed):
    sites = recognise(host.graph).sites
    effort = replace(EFFORTS["low"], seconds=0.5, rounds=4)
    data = Calibration.of(host.graph, batches)
    given = {"sites": sites, "inputs": batches[0], "data": data, "runtime": "torch", "seed": seed, "effort": effort}
    asked = setting(host, BUDGET, PASSES, **given)
    outcome = under_budget(asked)
    if outcome.moves:
        _, validate = halves(asked)
        assert Judge(host, validate, asked.budget).loss(outcome.host).upper <= BUDGET
        assert outcome.search.bound <= BUDGET
    return outcome


def test_no_plan_is_validated_over_its_budget(recall):
    """A window of 64 loses most answers: it is tried, and not taken everywhere."""
    outcome = require_within_budget(*recall, seed=0)
    losses = [o.loss for g in outcome.search.groups for o in g.options if o.loss is not None]
    assert max(losses) > BUDGET


@pytest.mark.exhaustive
def test_nor_one_by_other_halves_of_the_data(recall):
    code = subject(trained_models.code_lm(), trained_models.code_windows(SAMPLES, LENGTH))
    for seed in range(1, 4):
        require_within_budget(*recall, seed)
        require_within_budget(*code, seed)
