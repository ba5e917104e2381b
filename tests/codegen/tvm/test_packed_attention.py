"""Packed batches on a CPU: every sequence by TVM's kernel, with what each of them gives on its own."""

from __future__ import annotations

import pytest
import torch
from packed_cases import PACKED

import attnopt.operators  # noqa: F401  (registers them)
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.packed_attention import run_tvm_packed
from attnopt.errors import InputMismatch

NEEDS_TVM = pytest.mark.skipif(missing() is not None, reason="TVM is not installed")


@pytest.mark.sampled(2)
@NEEDS_TVM
@pytest.mark.parametrize("name", ["causal", "last_queries", "no_keys", "by_sequence"])
def test_table(name):
    case = PACKED[name]
    given, operands = case.tensors()
    o, lse = torch.ops.attnopt.tvm_attention_packed_lse(*given, list(operands.values()), case.spec)
    torch.testing.assert_close(o.double(), case.wanted()[0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), case.wanted()[1], atol=2e-5, rtol=2e-5)


@NEEDS_TVM
def test_nothing_beyond_a_sequence_is_read():
    case = PACKED["causal"]
    (q, k, v, *starts), _ = case.tensors()
    want = torch.ops.attnopt.tvm_attention_packed(q, k, v, *starts, [], case.spec)
    k[17:57] = v[17:57] = q[17:57] = torch.nan
    found = torch.ops.attnopt.tvm_attention_packed(q, k, v, *starts, [], case.spec)
    assert torch.equal(found[:17], want[:17]) and torch.equal(found[57:], want[57:]) and found[17:57].isnan().all()


def test_operator_is_one_that_torch_can_trace():
    case = PACKED["causal"]
    given, _ = case.tensors()
    for operator in (torch.ops.attnopt.tvm_attention_packed, torch.ops.attnopt.tvm_attention_packed_lse):
        told = torch.library.opcheck(operator.default, (*given, [], case.spec), test_utils=("test_schema", "test_faketensor"))
        assert set(told.values()) == {"SUCCESS"}


def test_a_sink_of_queries_without_keys():
    q, k = torch.randn(4, 2, 16), torch.randn(3, 1, 16)
    o, lse = run_tvm_packed(q, k, k, torch.tensor([0, 2, 4]), torch.tensor([0, 3, 3]), [], "softmax sink(0.5)", lse=True)
    assert torch.equal(o[2:], torch.zeros(2, 2, 16))
    assert torch.equal(lse[:, 2:], torch.full((2, 2), 0.5))


def test_refusals():
    given, _ = PACKED["causal"].tensors()
    for line, message in (
        ("softmax blocks(8, 8, operand=list)", "a list of blocks is of one length"),
        ("sigmoid", "the normaliser is sigmoid, not softmax"),
    ):
        with pytest.raises(InputMismatch, match=message):
            run_tvm_packed(*given, [torch.ones(1)] * ("list" in line), line)
    with pytest.raises(InputMismatch, match="starts are no list"):
        run_tvm_packed(*given[:3], torch.zeros(5), given[4], [], "softmax")
