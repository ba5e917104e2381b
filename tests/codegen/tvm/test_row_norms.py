"""Normalised queries and keys: kernels against the reference, and what the family leaves to others."""

from __future__ import annotations

import pytest
import torch
from prefill_kernels import attention

from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.cuda import cuda_source
from attnopt.codegen.tvm.prefill import supports
from attnopt.codegen.tvm.tvm_attention import with_rows
from attnopt.ir.reference import reference
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse

NEEDS_TVM = pytest.mark.skipif(missing() is not None, reason="TVM is not installed")
RMS = "softmax norm(rms, q_gain=g, k_gain=f) scale(0.25) causal"


@NEEDS_TVM
@pytest.mark.parametrize(
    ("line", "width"),
    [
        (RMS, 24),
        ("softmax norm(l2, eps=0.001, center=yes, k_gain=f) scale(5.0) softcap(9.0)", 16),
        ("softmax norm(layer, on=k) scale(0.25) causal", 16),
    ],
)
@pytest.mark.sampled(2)
def test_norms(line, width):
    q, k, v = 3 * torch.randn(2, 4, 70, width) + 1, torch.randn(2, 2, 90, width) + 1, torch.randn(2, 2, 90, 16)
    q[0, 0, 3] = k[1, 1, 5] = 0
    gains = {"g": torch.rand(4, width) + 0.5, "f": torch.rand(1, width) + 0.5}
    gains = {name: gains[name] for name in parse(line).operands}
    o, _ = attention(line, q, k, v, **gains)
    want = reference(line, q.double(), k.double(), v.double(), **gains)
    torch.testing.assert_close(o.double(), want, atol=3e-5, rtol=3e-5)


def test_a_gain_for_all_heads_is_a_matrix_of_one_row():
    g, bias, f = torch.rand(24), torch.rand(24), torch.rand(2, 1)
    assert [tuple(x.shape) for x in with_rows([g, bias, f], (0, 2))] == [(1, 24), (24,), (2, 1)]


def test_refusals():
    said = supports(parse("softmax norm(longest)"), Form(64, 64))
    assert said is not None and said.reason == "norm(longest) depends on all rows of a head"
    made = cuda_source(parse("softmax norm(rms)"), Form(64, 64))
    assert isinstance(made, Refusal) and made.reason == "this schedule does not normalise queries and keys"
