"""sage-attention: its variants as specs, which of them the kernels of a target take, and what the planner makes of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from self_attention import SelfAttention, example

import attnopt
from attnopt.codegen.triton.prefill import Form, supports
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.cpu import host
from attnopt.codegen.tvm.low_precision import PRODUCTS
from attnopt.cost.target import load_target
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.reference import reference
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse
from attnopt.passes import SageAttention
from attnopt.passes.quantize.sage_attention import precision, refuse
from attnopt.patterns import recognise
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.offered import without_kernel
from attnopt.plan.options.proposals import Move, Proposal
from attnopt.plan.options.workshop import Workshop

BYTES = missing() is None and any(host().has(feature) for feature in PRODUCTS)  # TVM has a kernel on this CPU
KINDS = ["int8 scores, fp32 values", "int8 scores, fp16 values", "int8 scores, fp8 values", "int4 scores, fp8 values"]


def opened(length=32, *, padded=True) -> FxHost:
    given = example(length=length)
    return FxHost.from_captured(capture(SelfAttention(), given if padded else {"x": given["x"]}))


def group_of(host):
    (group,) = Grouping(host, recognise(host.graph).sites).of("site")
    return group


def seen(mean, variance):
    v = SimpleNamespace(mean=torch.tensor(mean), variance=torch.tensor(variance))
    return SimpleNamespace(attention=lambda site: SimpleNamespace(v=v))


def test_the_specs_that_it_asks_for():
    group = group_of(opened())
    rewrite = SageAttention()
    candidates = rewrite.propose(group, None)
    assert [c.kind for c in candidates] == KINDS
    assert all(c.changes == ("precision",) and not c.exact for c in candidates)
    (site,) = rewrite.apply(candidates[2], group).sites
    assert str(site.spec) == (
        f"{group.sites[0].spec} precision(q=int8, k=int8, p=fp8, v=fp8, q_group=row // 32 * 8 + row % 8, "
        "k_group=k // 64 * 4 + k % 8 // 2, v_axis=channel, k_smooth=0, block=64, sum=fp22)"
    )
    assert site.steps[-1] == "sage-attention"
    (coarse,) = rewrite.apply(candidates[3], group).sites
    assert "q=int4" in str(coarse.spec) and "q_smooth=row // 128" in str(coarse.spec)


def test_values_are_smoothed_where_their_means_are_large():
    group, rewrite = group_of(opened(padded=False)), SageAttention()
    assert [c.kind for c in rewrite.propose(group, seen([0.5, -0.9], [1.0, 1.0]))] == KINDS
    more = rewrite.propose(group, seen([0.5, -3.0], [1.0, 1.0]))
    assert [c.kind for c in more] == [*KINDS, "int8 scores, fp8 values smoothed", "int4 scores, fp8 values smoothed"]
    (site,) = rewrite.apply(more[4], group).sites
    assert "v_smooth=0" in str(site.spec)
    assert [c.kind for c in rewrite.propose(group_of(opened()), seen([-3.0], [1.0]))] == KINDS  # padding would count in the mean


@pytest.mark.parametrize(
    ("scores", "values", "reason"),
    [
        ("int8", "fp32", ""),
        ("int8", "fp16", ""),
        ("int8", "fp8", ""),
        ("int4", "fp8", "Triton has no product of int4, nor have tensor cores since Hopper: int8 takes the same time"),
    ],
)
def test_the_kernels_take_what_they_can(scores, values, reason):
    spec = group_of(opened()).sites[0].spec.with_(precision=precision(scores, values), mask=None)
    said = supports(spec, Form(16, 16, "float32"))
    assert (said.reason if said else "") == reason


@pytest.mark.parametrize(
    ("target", "lacking"),
    [
        ("h200", {3: "Triton has no product of int4"}),
        ("a100", {2: "sm_80 does not multiply fp8 (E4M3)", 3: "Triton has no product of int4"}),
        ("cpu", {**({} if BYTES else {0: ""}), 1: "", 2: "", 3: ""}),
    ],
)
def test_only_what_a_target_computes_is_offered(target, lacking):
    host = opened()
    group, rewrite = group_of(host), SageAttention()
    shop = Workshop(host, {}, load_target(target)[0], "torch", 0, {})
    found = [without_kernel(Proposal((Move(rewrite, group, c),)), shop) for c in rewrite.propose(group, None)]
    assert {i: reason for i, reason in enumerate(found) if reason is not None}.keys() == lacking.keys()
    for i, reason in lacking.items():
        assert found[i].reason.startswith(f"{KINDS[i]}: no kernel computes it: {reason}")


def test_what_it_costs_in_accuracy():
    """Four bits lose more than eight, and eight little: the order in which a budget admits them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 256, 64, dtype=torch.float64) for _ in range(3))
    k = k + 3 * torch.randn(1, 1, 1, 64, dtype=torch.float64)
    plain = reference("softmax scale(0.125) causal", q, k, v)
    lost = []
    for scores, values in SageAttention().variants:
        found = reference(f"softmax scale(0.125) causal {precision(scores, values)}", q, k, v)
        lost.append(1 - float(torch.nn.functional.cosine_similarity(found.flatten(), plain.flatten(), dim=0)))
    assert lost[1:] == sorted(lost[1:])
    assert lost[0] < 1e-4 and lost[1] < 1e-4 and lost[2] < 1e-3 < lost[3]


def test_refusals():
    few = SimpleNamespace(spec=parse("softmax causal"), weights_used=None, size=lambda axis: 6, name="decode")
    assert str(refuse(few, "torch")) == "6 queries: the products take no time (at decode)"
    few.spec = parse("sigmoid")
    assert refuse(few, "torch").reason.startswith("the normaliser is sigmoid")
    again = group_of(opened())
    (rounded,) = SageAttention().apply(SageAttention().propose(again, None)[0], again).sites
    said = SageAttention().propose(type(again)(again.host, (rounded,)), None)
    assert isinstance(said, Refusal) and said.reason.startswith("it is rounded already: precision(")


def test_onnx_models_are_refused():
    host = OnnxHost.from_model(opened().to_onnx())
    said = SageAttention().propose(group_of(host), None)
    assert isinstance(said, Refusal)
    assert said.reason == "no operator of ONNX multiplies rounded queries and keys inside of an attention"


def test_a_plan_for_a_gpu_is_made_and_checked_without_one():
    given = example(length=64)
    made = attnopt.optimize(
        SelfAttention(), given, target="h200", budget=0.05, select="always", passes=["fuse-attention", "sage-attention"]
    )
    (report,) = [r for r in made.report.rewrites if r.name == "sage-attention"]
    assert "int8 scores" in report.description
    with torch.no_grad():
        wanted, found = SelfAttention().eval()(**given)["hidden"], made(**given)["hidden"]
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.05
    on_cpu = attnopt.optimize(SelfAttention(), given, budget=0.05, select="model", passes=["fuse-attention", "sage-attention"])
    (report,) = [r for r in on_cpu.report.rewrites if r.name == "sage-attention"]
    assert ("no kernel computes it" in report.why) is not BYTES  # there it is a candidate, and loses what is measured
