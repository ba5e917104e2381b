"""A plan is data: it survives JSON, does the same again without a search, and refuses a model that it is not of."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from self_attention import SelfAttention, example

import attnopt
from attnopt.errors import PlanError, UnknownPass
from attnopt.report.plan import Plan


@pytest.fixture(scope="module")
def fast():
    model, inputs = SelfAttention().eval(), example(8, 12)
    model.q.weight.data[:, 5] /= 100.0
    inputs["x"][..., 5] *= 100.0  # an outlier, so that smoothing is among the steps
    return model, inputs, attnopt.optimize(model, inputs, budget=0.05, select="always", passes=["fuse-attention", "dynamic-int8"])


def test_json(fast):
    plan = fast[2].plan
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == Plan.from_json(plan.to_json())
    assert [s.rewrite for s in plan.steps] == ["dynamic-int8"] * 2
    assert plan.kernels == {s.name: s.kernel for s in fast[2].report.sites}
    assert (plan.metric, plan.budget, plan.host) == ("mean 1 - cosine", 0.05, "torch")
    assert 0 < plan.loss <= 0.05
    for line in ("kernel sdpa", "dynamic-int8: the"):
        assert line in str(plan)


def test_the_same_again_without_a_search(fast, monkeypatch, tmp_path):
    model, inputs, first = fast
    monkeypatch.setattr("attnopt.plan.pipeline.under_budget", lambda *_: pytest.fail("searched"))
    monkeypatch.setattr("attnopt.plan.pipeline.choose", lambda *_, **__: pytest.fail("chose kernels"))
    text = tmp_path / "plan.json"
    text.write_text(json.dumps(first.plan.to_json()))
    named = example(3, 9)
    for given in (first.plan, text, first.export(tmp_path / "fast.pt2")):
        again = attnopt.optimize(model, inputs, plan=given, select="model")
        torch.testing.assert_close(again(**named)["hidden"], first(**named)["hidden"], atol=0, rtol=0)
        assert again.report.difference.exact is False
        assert Plan.from_json(again.plan.to_json()) == Plan.from_json(first.plan.to_json())
        assert {s.why for s in again.report.sites} == {"as the plan says"}


def test_it_travels_in_an_onnx_file(fast, tmp_path):
    """The names are those of the file, so that its plan can be applied to an export of the same model."""
    first = fast[2]
    plain = first._opened.host.to_onnx()
    path = first.export(tmp_path / "fast.onnx")
    held = attnopt.load(path).plan
    assert (held.host, held.runtime, len(held.steps)) == ("onnx", "onnxruntime", 2)
    again = attnopt.optimize(plain, plan=path, select="model")
    named = {n: x.numpy() for n, x in example(3, 9).items()}
    torch.testing.assert_close(
        torch.from_numpy(again(named)[0]), torch.from_numpy(attnopt.load(path)(named)[0]), atol=1e-5, rtol=1e-5
    )


def changed(plan, **changes):
    return replace(plan, steps=(replace(plan.steps[0], **changes),))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda p: changed(p, group="elsewhere"), PlanError, "the model has no 'elsewhere'"),
        (lambda p: changed(p, nodes=("elsewhere",)), PlanError, "the model has no node 'elsewhere'"),
        (lambda p: changed(p, rewrite="dynamic-int9"), UnknownPass, "Did you mean 'dynamic-int8'"),
        (lambda p: replace(p, kernels={"elsewhere": "sdpa"}), PlanError, "the model has no attention 'elsewhere'"),
        (lambda p: replace(p, kernels=dict.fromkeys(p.kernels, "warp")), PlanError, "the plan names the kernel 'warp'"),
    ],
)
def test_a_plan_of_another_model(fast, make, error, says):
    model, inputs, first = fast
    with pytest.raises(error, match=says):
        attnopt.optimize(model, inputs, plan=make(first.plan), select="model")


@pytest.mark.parametrize(
    "record", [{}, [], "plan", {"version": 1}, {"version": 2}, {"version": 1, "steps": [{}]}, {"version": "x"}]
)
def test_what_is_no_plan(record, tmp_path):
    with pytest.raises(PlanError):
        Plan.from_json(record)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(record))
    with pytest.raises(PlanError):
        attnopt.optimize(SelfAttention().eval(), example(), plan=path)


def test_files_without_a_plan(tmp_path):
    for name, content in (("absent.json", None), ("junk.json", "junk")):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(PlanError, match="cannot read a plan"):
            attnopt.optimize(SelfAttention().eval(), example(), plan=tmp_path / name)


def test_codes_are_read_back_from_a_file(tmp_path):
    """GPTQ's are of the data: without these the file has to hold them, and the plan alone does not."""
    model, inputs = SelfAttention().eval(), example(8, 12)
    first = attnopt.optimize(model, inputs, budget=0.5, select="always", passes=["gptq"])
    named = example(3, 9)
    path = first.export(tmp_path / "fast.pt2")
    again = attnopt.optimize(model, example(2, 5), plan=path, select="model")
    torch.testing.assert_close(again(**named)["hidden"], first(**named)["hidden"], atol=0, rtol=0)
    with pytest.raises(PlanError, match="Give the calibration data"):
        attnopt.optimize(model, example(2, 5), plan=Plan.from_json(first.plan.to_json()), select="model")
