"""The whole story: what is applied, verified, approximated, rolled back, and recorded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from cached_step import Step, example
from hosts.onnx import small_models
from onnx import helper
from plan_fakes import Kernel, Off, clock

from attnopt.analysis.calibration import Calibration
from attnopt.errors import AccuracyError
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Refusal
from attnopt.passes import ALL, Candidate, DynamicInt8, Evidence, FuseAttention, Group, Int8Cache
from attnopt.passes.candidate import Per
from attnopt.plan.budgeted import UNSEEN
from attnopt.plan.judge.budget import Budget
from attnopt.plan.pipeline import Request, run


@pytest.fixture
def host():
    return OnnxHost.from_model(small_models.spelled_out())


def request_for(host, **options):
    given = {"select": "always", "inputs": host.example_inputs()} | options
    given["budget"] = Budget.of(given.get("budget", 0.0))
    return Request("cpu", "onnxruntime", host.opset, **given)


def kernels(monkeypatch, *fakes):
    monkeypatch.setattr("attnopt.plan.choose.LOWERINGS", fakes)


def test_everything_is_recorded(host):
    result, report = run(host, request_for(host))
    (site,) = report.sites
    assert (report.target, report.runtime, report.select, report.budget) == ("cpu", "onnxruntime", "always", 0.0)
    assert (site.kernel, site.steps, report.fused, report.notes) == ("ort-mha", ("fuse-attention",), 1, ())
    assert site.before == site.after == "softmax heads(4) width(8) scale(0.3535534)"
    assert report.difference is not None
    assert report.difference.max_rel <= report.difference.tolerance == 1e-4
    assert {"recognise", "choose", "apply", "verify"} <= set(report.seconds_spent)
    assert "Softmax" in [n.op_type for n in host.model.graph]
    assert "Softmax" not in [n.op_type for n in result.model.graph]


@pytest.mark.parametrize(("seconds", "kept"), [(0.5, True), (1.04, True), (1.06, False)])
def test_a_slower_model_is_rolled_back(monkeypatch, host, seconds, kept):
    monkeypatch.setattr("attnopt.plan.pipeline.in_turn", clock({"before": 1.0, "after": seconds}))
    monkeypatch.setattr("attnopt.plan.choose.in_turn", clock({}))
    monkeypatch.setattr("attnopt.plan.timing.stepwise.in_turn", clock({"after": 0.5}))
    asked = request_for(host, select="measure", budget=0.1, passes=(FuseAttention(), Off((0.01,))))
    result, report = run(host, asked)
    (site,), (rewrite,) = report.sites, report.rewrites
    assert (result is not host, report.fused == 1, rewrite.kept, report.seconds_before) == (kept, kept, kept, 1.0)
    if kept:
        assert (report.notes, report.seconds_after) == ((UNSEEN,), seconds)
    else:
        assert report.notes == (
            UNSEEN,
            "rolled back: the whole model measured 1.06e+03 ms against 1e+03 ms before",
        )
        assert (site.kernel, site.why, site.steps) == ("original", "rolled back with the whole model", ())
        assert rewrite.why.endswith("within the budget 0.1; rolled back with the whole model")
        assert report.plan.steps == ()
        assert report.seconds_after == 1.0
        assert report.difference is not None
        assert report.difference.max_abs == 0.0


@pytest.mark.parametrize("factor", [1.01, -1.0, float("nan")])
def test_a_kernel_that_computes_something_else_is_not_handed_over(monkeypatch, host, factor):
    kernels(monkeypatch, Kernel("wrong", factor=factor))
    with pytest.raises(AccuracyError) as raised:
        run(host, request_for(host))
    assert raised.value.tolerance == 1e-4
    assert not raised.value.max_rel < 1e-3


def test_a_difference_inside_the_tolerance_is_reported(monkeypatch, host):
    kernels(monkeypatch, Kernel("near", factor=1.00001))
    _, report = run(host, request_for(host))
    assert report.difference is not None
    assert 1e-6 < report.difference.max_abs < 1e-4


@dataclass(frozen=True)
class Forbidden:
    """A pass that must not be asked."""

    name: str = "forbidden"
    exact: bool = False
    per: Per = "model"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        raise AssertionError("asked for an approximation")

    def apply(self, candidate: Candidate, group: Group) -> Group:
        raise AssertionError("approximated")


def test_without_a_budget_nothing_is_approximated(host):
    _, report = run(host, request_for(host, passes=(FuseAttention(), Forbidden())))
    assert (report.rewrites, report.fused) == ((), 1)
    with pytest.raises(AssertionError, match="asked"):
        run(host, request_for(host, passes=(Forbidden(),), budget=0.1))


def test_losses_are_measured_on_the_calibration_inputs_against_the_original(host):
    """Both together would lose 1.08 * 1.05 - 1; one alone is within the budget, and the one that loses less is taken."""
    batches = [{name: torch.randn(1, 4, 3, 8) for name in "qkv"} for _ in range(32)]
    batch = batches[0]
    passes = (FuseAttention(), Off((0.08,)), Off((0.05,), name="more"))
    result, report = run(host, request_for(host, budget=0.1, passes=passes, calibration=Calibration.of(host.graph, batches)))
    assert [(r.name, r.kept) for r in report.rewrites] == [("off", False), ("more", True)]
    assert [r.loss for r in report.rewrites] == pytest.approx([0.08, 0.05], rel=1e-3)
    assert report.search.samples == (16, 16)
    assert report.search.loss <= report.search.bound <= 0.1
    assert [(s.rewrite, s.kind) for s in report.plan.steps] == [("more", "off 0.05")]
    assert report.difference is not None
    assert not report.difference.exact
    torch.testing.assert_close(result.runner()(batch)[0], host.runner()(batch)[0] * 1.05, atol=1e-4, rtol=1e-4)


def test_an_output_without_real_numbers_has_no_loss():
    nodes = [helper.make_node("ArgMax", ["x"], ["y"], name="best", axis=-1, keepdims=0)]
    proto = small_models.model(nodes, [small_models.value("x", ["n", 64])])
    proto.graph.output[0].type.tensor_type.elem_type = small_models.INT64
    host = OnnxHost.from_model(proto)
    result, report = run(host, request_for(host, budget=0.1))
    assert result is host
    why = "the model returns no real numbers, on which a loss is measured"
    assert [(r.name, r.kept, r.why) for r in report.rewrites] == [(p.name, False, why) for p in ALL if not p.exact]


def test_without_inputs_nothing_is_run(host):
    result, report = run(host, request_for(host, inputs=None))
    assert (report.fused, report.difference, report.seconds_before) == (1, None, None)
    assert result is not host


def test_sites_that_stay_have_a_reason():
    read = OnnxHost.from_model(small_models.spelled_out())
    read.model.graph.outputs.append(next(n for n in read.model.graph if n.op_type == "Softmax").outputs[0])
    result, report = run(read, request_for(read))
    assert result is read
    assert report.sites[0].kernel == "original"
    assert report.sites[0].why.startswith("the attention weights themselves are read")
    whole = OnnxHost.from_model(small_models.spelled_out())
    _, report = run(whole, request_for(whole, passes=()))
    assert (report.sites[0].kernel, report.sites[0].why) == ("original", "no exact pass was asked for")


def decoding_step():
    host = FxHost.from_captured(capture(Step().eval(), example()))
    torch.manual_seed(2)
    x, (k, v) = example()
    names = [spec.name for spec in host.input_specs]
    noise = [[t + 0.1 * torch.randn_like(t) for t in (x, k, v)] for _ in range(16)]
    return host, Calibration.of(host.graph, [dict(zip(names, tensors, strict=True)) for tensors in noise])


def test_the_plan_of_least_memory(monkeypatch):
    """Everything measures slower: for time nothing is left, for memory weights and cache become int8."""
    host, data = decoding_step()
    monkeypatch.setattr("attnopt.plan.timing.stepwise.in_turn", clock({"before": 1.0, "after": 1.2}))
    monkeypatch.setattr("attnopt.plan.pipeline.in_turn", clock({"before": 1.0, "after": 1.2}))
    monkeypatch.setattr("attnopt.plan.choose.in_turn", clock({}))
    asked = Request("cpu", "torch", 0, "measure", Budget.of(0.1), inputs=host.example_inputs(), calibration=data)
    asked = replace(asked, passes=(DynamicInt8(smallest=16), Int8Cache()))
    result, report = run(host, asked)
    assert result is host and report.plan.steps == () and report.bytes_after == report.bytes_before
    result, report = run(host, replace(asked, minimise="memory"))
    kinds = {s.kind for s in report.plan.steps}
    assert {"int8"} <= kinds and {s.rewrite for s in report.plan.steps} == {"dynamic-int8", "int8-cache"}
    linears, cache = 32 * (32 + 16 + 16 + 32), 2 * 6 * 2 * 2
    assert (report.bytes_before, report.bytes_after) == (4 * linears + 32 * cache, linears + 16 * cache)
    assert "slower, and kept: memory was to be least" in report.notes[-1]
    assert "weights and cache 0.0138 MB -> 0.00384 MB" in str(report)
    assert report.search.loss <= report.search.bound <= 0.1
