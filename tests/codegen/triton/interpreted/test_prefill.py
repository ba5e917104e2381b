"""The emitted kernels compute what the reference does, in Triton's interpreter, into outputs that hold NaN before."""

from __future__ import annotations

import pytest
import torch
from prefill_cases import TABLE, exact, tensors, tolerance

from attnopt.codegen.emitted import load
from attnopt.codegen.triton.prefill import emit, supports
from attnopt.codegen.triton.tiles import Tile
from attnopt.codegen.triton.triton_attention import form_of, run_triton
from attnopt.errors import InputMismatch
from attnopt.ir.reference import attend, reference
from attnopt.ir.spec import parse


def tile(longest: int) -> Tile:
    """Small enough that a case is cut apart; where it is long, as few steps as that takes."""
    return Tile(16, 16, 1, 1) if longest <= 64 else Tile(32, 16, 1, 1) if longest <= 100 else Tile(64, 64, 1, 1)


def run(line, q, k, v, operands, lse=False, size=None):
    spec = parse(line)
    form = form_of(q, v.shape[3], {name: operands[name] for name in spec.operands}, lse)
    assert supports(spec, form) is None
    module = load(emit(spec, form, size or tile(max(q.shape[2], k.shape[2]))))
    poisoned = torch.full((*q.shape[:3], v.shape[3]), torch.nan, dtype=q.dtype)
    return module.attention(q, k, v, *(operands[name] for name in spec.operands), o=poisoned)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", [name for name, case in TABLE.items() if case.dtype != "bfloat16"])
def test_computes_what_the_reference_does(name):
    case = TABLE[name]
    (q, k, v), rest = tensors(case)
    allowed = tolerance(case)
    torch.testing.assert_close(run(case.spec, q, k, v, rest).double(), exact(case), atol=allowed, rtol=allowed)


def test_bfloat16_through_the_operator():
    case = TABLE["bfloat16"]
    (q, k, v), _ = tensors(case)
    found = torch.ops.attnopt.triton_attention(q, k, v, [], case.spec)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact(case), atol=tolerance(case), rtol=tolerance(case))


@pytest.mark.parametrize(
    "line",
    [
        "softmax scale(0.25) causal",
        "softmax scale(0.25) softcap(2.0) causal & window(3)",
        "softmax scale(0.25) sink(0.5)",
        "softmax scale(0.25) k < q empty(zero)",
    ],
)
def test_log_sum_exp(line):
    q, k, v = torch.randn(2, 2, 20, 16), torch.randn(2, 1, 20, 16), torch.randn(2, 1, 20, 16)
    o, lse = run(line, q, k, v, {}, lse=True)
    right = attend(line, q.double(), k.double(), v.double())
    torch.testing.assert_close(o.double(), right.output, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), right.lse, atol=2e-5, rtol=2e-5)


def test_key_and_value_heads_differ():
    q, k, v = torch.randn(1, 6, 9, 16), torch.randn(1, 3, 20, 16), torch.randn(1, 2, 20, 32)
    right = reference("softmax scale(0.25)", q.double(), k.double(), v.double())
    torch.testing.assert_close(run("softmax scale(0.25)", q, k, v, {}).double(), right, atol=2e-5, rtol=2e-5)


def test_layouts_of_tensors():
    """Heads inside of positions, as projections leave them, and rows whose channels are apart."""
    q, k, v = torch.randn(2, 20, 4, 16).transpose(1, 2), torch.randn(2, 20, 2, 16).transpose(1, 2), torch.randn(2, 2, 16, 20).mT
    right = reference("softmax scale(0.25) causal", q.double(), k.double(), v.double())
    torch.testing.assert_close(run("softmax scale(0.25) causal", q, k, v, {}).double(), right, atol=2e-5, rtol=2e-5)


def test_documents():
    q, k, v = torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    document = torch.stack([torch.arange(40) // 13, torch.arange(40) // 7])
    line = "softmax scale(0.25) causal & document"
    right = reference(line, q.double(), k.double(), v.double(), document=document)
    torch.testing.assert_close(run(line, q, k, v, {"document": document}).double(), right, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_padding_of_numbers(dtype):
    q, k, v = torch.randn(2, 2, 9, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16)
    padding = (torch.arange(20) < torch.tensor([[20], [6]])).to(dtype)
    right = reference("softmax scale(0.25) padding", q.double(), k.double(), v.double(), padding=padding)
    found = run("softmax scale(0.25) padding", q, k, v, {"padding": padding})
    torch.testing.assert_close(found.double(), right, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -torch.inf, -10000.0])
def test_bias_that_hides(fill):
    """The smallest float drowns a score, and where all are drowned they are equal; minus infinity in a whole row gives zero."""
    q, k, v = torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16)
    bias = torch.where(torch.arange(20)[None] <= torch.arange(20)[:, None] - 2, 0.0, fill)
    line = "softmax scale(0.25) add(load(bias, row, k))"
    found = run(line, q, k, v, {"bias": bias})
    right = reference(line, q, k, v, bias=bias)
    torch.testing.assert_close(found, right, atol=3e-4 if fill == -10000.0 else 2e-5, rtol=2e-5)


def test_names_of_operands_that_the_kernel_has():
    q, k, v = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    q0, kn, rows = torch.randn(2), torch.randn(9), torch.randn(9)
    line = "softmax scale(0.25) add(load(q, h)) add(load(kn, k)) add(load(rows.0, row))"
    right = reference(line.replace("load(q, ", "load(x, "), q.double(), k.double(), v.double(), x=q0, kn=kn, **{"rows.0": rows})
    found = run(line, q, k, v, {"q": q0, "kn": kn, "rows.0": rows})
    torch.testing.assert_close(found.double(), right, atol=2e-5, rtol=2e-5)


def test_no_queries():
    q, k, v = torch.randn(1, 2, 0, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    assert run_triton(q, k, v, [], parse("softmax")).shape == (1, 2, 0, 16)


def test_no_gradients():
    q, k, v = torch.randn(1, 2, 4, 16, requires_grad=True), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    with pytest.raises(InputMismatch, match="have no gradient"):
        torch.ops.attnopt.triton_attention(q, k, v, [], "softmax")
    with torch.no_grad():
        assert torch.ops.attnopt.triton_attention(q, k, v, [], "softmax").isfinite().all()


def test_operator_is_one_that_torch_can_trace():
    q, k, table = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 9, 16), torch.randn(2)
    given = (q, k, k, [table], "softmax sink(load(table, h))")
    checks = ("test_schema", "test_faketensor")
    assert set(torch.library.opcheck(torch.ops.attnopt.triton_attention.default, given, test_utils=checks).values()) == {
        "SUCCESS"
    }
    assert set(torch.library.opcheck(torch.ops.attnopt.triton_attention_lse.default, given, test_utils=checks).values()) == {
        "SUCCESS"
    }
