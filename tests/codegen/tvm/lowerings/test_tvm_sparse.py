"""Sparse attention in the graph of a model, by TVM's kernels: what is taken, what is refused, and that the numbers are the spec's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from self_attention import SelfAttention

import attnopt.operators  # noqa: F401  (registers them)
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.lowerings.tvm_sparse import TvmSparse
from attnopt.errors import InputMismatch
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.reference import attend
from attnopt.ir.spec import parse
from attnopt.passes.sparsity import changed
from attnopt.patterns import recognise
from attnopt.plan.choose import emit

pytestmark = pytest.mark.skipif(missing() is not None, reason="TVM is not installed")
LINES = [
    "causal pooled_blocks(64, 64, share=0.4, similarity=-1.0, first=1)",
    "causal block_topk(64, 2)",
    "causal & (window(32) | global(4)) delta(16, dense=causal, tail=20)",
]


def drifting(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).cumsum(2) / 8


@pytest.mark.sampled(1)
@pytest.mark.parametrize("line", LINES)
def test_the_operator_computes_the_spec(line):
    q, k, v = drifting(1, 4, 200, 32), drifting(1, 2, 200, 32), torch.randn(1, 2, 200, 32)
    line = f"softmax scale(0.2) {line}"
    right = attend(line, q.double(), k.double(), v.double()).output
    found = torch.ops.attnopt.tvm_sparse(q, k, v, [], line)
    torch.testing.assert_close(found.double(), right, atol=2e-5, rtol=2e-5)
    dense = attend("softmax scale(0.2) causal", q.double(), k.double(), v.double()).output
    assert not torch.allclose(found.double(), dense, atol=1e-3)


def test_torch_can_trace_it():
    q, k, v = drifting(1, 4, 200, 32), drifting(1, 2, 200, 32), torch.randn(1, 2, 200, 32)
    given = (q, k, v, [], f"softmax scale(0.2) {LINES[0]}")
    for operator in (torch.ops.attnopt.tvm_sparse, torch.ops.attnopt.triton_sparse):
        checks = torch.library.opcheck(operator.default, given, test_utils=("test_schema", "test_faketensor"))
        assert set(checks.values()) == {"SUCCESS"}
        with pytest.raises(InputMismatch, match="have no gradient"):
            operator(q.clone().requires_grad_(), k, v, *given[3:])


def test_in_a_model():
    model, x = SelfAttention().eval(), torch.randn(1, 200, 64)
    made = FxHost.from_captured(capture(model, (x,))).copy()
    (site,) = recognise(made.graph).sites
    sparse = site.with_step("sparsify", changed(site.spec, "pooled_blocks(64, 64, share=0.5, similarity=-1.0, first=1)"))
    assert TvmSparse().supports(sparse, "torch") is None
    emit(made, sparse, TvmSparse())
    made.finish()
    with torch.no_grad():
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (model.q, model.k, model.v))
        wanted = model.o(attend(sparse.spec, q, k, v).output.transpose(1, 2).flatten(2))
    torch.testing.assert_close(made.runner()({"x": x})[0], wanted, atol=2e-5, rtol=2e-5)


def test_refusals():
    model = SelfAttention().eval()
    (site,) = recognise(FxHost.from_captured(capture(model, (torch.randn(1, 70, 64),))).graph).sites
    for line, runtime, why in (
        ("softmax causal", "torch", "no tile is left out but by bounds"),
        ("softmax causal block_topk(64, 2)", "onnxruntime", "has no TVM kernels"),
        ("softmax causal top_keys(3)", "torch", "chooses single keys"),
        ("softmax causal blocks(64, 64, operand=t)", "torch", "t is not known inside the kernel"),
        ("softmax sink(0.5) softcap(2.0) causal pooled_blocks(64, 64)", "torch", "not for 'softcap(2.0)'"),
    ):
        found = TvmSparse().supports(replace(site, spec=parse(line)), runtime)
        assert found is not None and why in found.reason
    q = torch.randn(1, 1, 8, 16)
    with pytest.raises(InputMismatch, match="only a whole prompt is corrected"):
        torch.ops.attnopt.tvm_sparse(q[:, :, :4], q, q, [], "softmax causal & window(2) delta(2, dense=causal)")
    with pytest.raises(InputMismatch, match="no tile is left out"):
        torch.ops.attnopt.tvm_sparse(q, q, q, [], "softmax causal")
