"""The operator attnopt::tvm_attention: what it computes, which tensors it takes, and what happens where there is no kernel."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from prefill_cases import TABLE, exact, tensors, tolerance

import attnopt.operators  # noqa: F401  (registers it)
from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm import availability, tvm_attention
from attnopt.codegen.tvm.cpu import host
from attnopt.codegen.tvm.tiles import narrowed, tiles
from attnopt.codegen.tvm.tvm_attention import kernel, ready, rows
from attnopt.errors import InputMismatch
from attnopt.ir.reference import attend
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse

TRIED = ("other_widths", "grouped", "window", "bias_and_mask", "first_row_mean", "sink_per_head", "half", "last_queries")
NEEDS_TVM = pytest.mark.skipif(availability.missing() is not None, reason="TVM is not installed")
LINE = "softmax scale(0.25) causal & window(5)"
SECOND = f"""
import sys, torch, attnopt.operators
x = torch.ones(1, 1, 3, 16)
print(torch.ops.attnopt.tvm_attention(x, x, x, [], "{LINE}").sum().item(), "tvm" in sys.modules)
"""
WITHOUT = """
import logging, sys
sys.modules["tvm"] = None
import torch, attnopt, attnopt.operators
logging.basicConfig(format="%(message)s", stream=sys.stdout)
x = torch.ones(1, 1, 4, 16)
for line in ("softmax scale(0.25)", "softmax scale(0.25) causal"):
    print(torch.ops.attnopt.tvm_attention(x, x, x, [], line).sum().item())
print(attnopt.optimize(torch.nn.Identity(), (x,)).report.sites)
"""


def run(case):
    (q, k, v), rest = tensors(case)
    return torch.ops.attnopt.tvm_attention(q, k, v, [rest[name] for name in parse(case.spec).operands], case.spec)


@pytest.mark.sampled(4)
@NEEDS_TVM
@pytest.mark.parametrize("name", TRIED)
def test_the_table(name):
    case = TABLE[name]
    torch.testing.assert_close(run(case).double(), exact(case), atol=tolerance(case), rtol=tolerance(case))


@NEEDS_TVM
def test_the_kernel_was_meant():
    for name in TRIED:
        case = TABLE[name]
        (q, _, v), rest = tensors(case)
        dtypes = tuple(rest[x].dtype for x in parse(case.spec).operands)
        found = ready(case.spec, q.dtype, q.shape[3], v.shape[3], dtypes, False, q.shape[2])
        assert not isinstance(found.kernel, Refusal), name


@NEEDS_TVM
def test_log_sum_exp():
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    right = attend(LINE, q, k, v)
    torch.testing.assert_close(
        torch.ops.attnopt.tvm_attention_lse(q, k, v, [], LINE), (right.output, right.lse), atol=1e-5, rtol=1e-5
    )


@NEEDS_TVM
def test_any_strides():
    q = torch.randn(2, 9, 4, 16).transpose(1, 2)  # as projections leave it
    k = torch.randn(2, 1, 9, 16).expand(2, 2, 9, 16)
    v = torch.randn(2, 2, 16, 9).mT  # channels that are apart
    found = torch.ops.attnopt.tvm_attention(q, k, v, [], LINE)
    torch.testing.assert_close(found, attend(LINE, q, k, v).output, atol=1e-5, rtol=1e-5)
    assert found.is_contiguous()
    assert rows(q) is q
    assert rows(k) is k
    assert rows(v).is_contiguous()
    assert rows(torch.randn(2, 3, 1).as_strided((2, 3, 1), (3, 1, 7))).stride(-1) == 1


def test_what_does_not_fit():
    x = torch.randn(1, 2, 4, 16)
    run = torch.ops.attnopt.tvm_attention
    for given, message in (
        ((x, x, x, [], "sigmoid"), "the normaliser is sigmoid, not softmax"),
        ((x, x[:, :, :0], x[:, :, :0], [], "softmax"), "there are no keys"),
        ((x, x[..., :8], x, [], "softmax"), "q and k differ in width"),
        ((x, x, x, [], "softmax heads(3)"), "the spec says heads"),
    ):
        with pytest.raises(InputMismatch, match=message):
            run(*given)
    assert run(x[:, :, :0], x, x, [], "softmax").shape == (1, 2, 0, 16)


def test_operands_that_do_not_fit():
    x, line = torch.randn(1, 2, 4, 16), "softmax scale(0.25) load(seen, b, 0, 0, k)"
    run = torch.ops.attnopt.tvm_attention
    for operands, message in (
        ([torch.ones(1, 4, dtype=torch.bool)], r"operand 'seen' is \[1, 4\], and is read by 4 indices"),
        ([torch.ones(1, 1, 1, 3, dtype=torch.bool)], "'seen' of shape .* is read from 0 to 3 along dimension 3"),
        ([], "0 operands were given, and the spec has 1"),
    ):
        with pytest.raises(InputMismatch, match=message):
            run(x, x, x, operands, line)


@NEEDS_TVM
def test_few_queries_get_a_narrow_tile():
    table = tiles(host(), Form(16, 16))
    assert narrowed(table, table[0], 1, host()).block_q == min(tile.block_q for tile in table)
    q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 40, 16)
    found = torch.ops.attnopt.tvm_attention(q, k, k, [], LINE)
    torch.testing.assert_close(found, attend(LINE, q, k, k).output, atol=1e-5, rtol=1e-5)


@NEEDS_TVM
def test_the_second_process_does_not_compile():
    x = torch.ones(1, 1, 3, 16)
    torch.ops.attnopt.tvm_attention(x, x, x, [], LINE)
    told = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, check=False)
    assert told.stdout.split() == ["48.0", "False"], told.stderr


def test_without_tvm_torch_takes_over_and_one_line_says_so():
    told = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    said = "TVM is not installed, so its kernels are left out"
    assert told.stdout.splitlines() == [said, "64.0", "64.0", "()"], told.stderr


def test_a_kernel_that_does_not_compile_is_one_line(monkeypatch, caplog):
    monkeypatch.setattr(tvm_attention, "missing", lambda: None)
    monkeypatch.setattr(tvm_attention, "compiled", lambda *given: Refusal("TVM cannot compile it: no such function"))
    ready.cache_clear()
    kernel.cache_clear()
    availability.say_once.cache_clear()
    q = torch.randn(1, 2, 4, 16)
    with caplog.at_level(logging.WARNING, "attnopt"):
        for _ in range(2):
            found = torch.ops.attnopt.tvm_attention(q, q, q, [], LINE)
    ready.cache_clear()
    kernel.cache_clear()
    torch.testing.assert_close(found, attend(LINE, q, q, q).output, atol=1e-5, rtol=1e-5)
    assert caplog.messages == ["torch's kernels take over: TVM cannot compile it: no such function"]
