"""The packed operator where nothing interprets: it traces, computes the reference on a CPU, and says what it cannot take."""

from __future__ import annotations

import pytest
import torch
from packed_cases import PACKED

from attnopt.codegen.triton.packed_attention import run_packed
from attnopt.errors import InputMismatch
from attnopt.ir.spec import parse


@pytest.mark.parametrize("name", ["last_queries", "by_sequence"])
def test_on_a_cpu_it_is_the_reference(name):
    case = PACKED[name]
    given, operands = case.tensors()
    o, lse = torch.ops.attnopt.triton_attention_packed_lse(*given, list(operands.values()), case.spec)
    torch.testing.assert_close(o.double(), case.wanted()[0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), case.wanted()[1], atol=2e-5, rtol=2e-5)


def test_operator_is_one_that_torch_can_trace():
    case = PACKED["causal"]
    given, _ = case.tensors()
    checks = ("test_schema", "test_faketensor")
    for operator in (torch.ops.attnopt.triton_attention_packed, torch.ops.attnopt.triton_attention_packed_lse):
        told = torch.library.opcheck(operator.default, (*given, [], case.spec), test_utils=checks)
        assert set(told.values()) == {"SUCCESS"}


def test_a_sink_of_queries_without_keys():
    q, k = torch.randn(4, 2, 16), torch.randn(3, 1, 16)
    starts = torch.tensor([0, 2, 4]), torch.tensor([0, 3, 3])
    o, lse = run_packed(q, k, k, *starts, [], parse("softmax sink(0.5)"), lse=True)
    assert torch.equal(o[2:], torch.zeros(2, 2, 16))
    assert torch.equal(lse[:, 2:], torch.full((2, 2), 0.5))


def change(at, value):
    case = PACKED["causal"]
    given, _ = case.tensors()
    given[at] = value
    return (*given, [], case.spec)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, torch.zeros(1, 2, 58, 16), "q has 4 dimensions"),
        (1, torch.zeros(58, 1, 8), "q and k differ in width"),
        (1, torch.zeros(0, 1, 16), "k and v differ in length"),
        (3, torch.zeros(5), "starts are no list"),
        (4, torch.zeros(4, dtype=torch.int32), "starts are no list"),
    ],
)
def test_refusals(at, value, message):
    with pytest.raises(InputMismatch, match=message):
        torch.ops.attnopt.triton_attention_packed(*change(at, value))


def test_no_gradients():
    case = PACKED["causal"]
    (q, *rest), _ = case.tensors()
    with pytest.raises(InputMismatch, match="have no gradient"):
        torch.ops.attnopt.triton_attention_packed(q.requires_grad_(), *rest, [], case.spec)
