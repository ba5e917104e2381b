"""The operator attnopt::tvm_decode: what it computes of each kind of cache, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decode_cases import TABLE, exact, tensors, tolerance

import attnopt.operators  # noqa: F401  (registers it)
from attnopt.codegen.tvm import availability, decode_attention
from attnopt.errors import InputMismatch
from attnopt.ir.kv_cache import Cache, attend_cache, pack_cache
from attnopt.ir.spec import parse

TRIED = ("many_rows", "value_heads", "bias", "own_lengths_mean", "odd_pages", "int8_pages", "kivi", "fp8_half", "mixed")
NEEDS_TVM = pytest.mark.skipif(availability.missing() is not None, reason="TVM is not installed")


def run(case, cache=None, operator="tvm_decode"):
    q, held, rest = tensors(case)
    operands = [rest[name] for name in parse(case.spec).operands]
    return getattr(torch.ops.attnopt, operator)(q, *(cache or held).parts, operands, case.spec)


@pytest.mark.sampled(1)
@NEEDS_TVM
@pytest.mark.parametrize("name", TRIED)
def test_the_table(name):
    case = TABLE[name]
    output, lse = run(case, operator="tvm_decode_lse")
    torch.testing.assert_close(output.double(), exact(case).output, atol=tolerance(case), rtol=tolerance(case))
    torch.testing.assert_close(lse.double(), exact(case).lse, atol=tolerance(case), rtol=tolerance(case))
    torch.testing.assert_close(run(case), output, atol=1e-6, rtol=1e-6)


def test_without_tvm_the_reference_takes_over(monkeypatch):
    monkeypatch.setattr(decode_attention, "missing", lambda: "TVM is not installed, so its kernels are left out")
    decode_attention.ready.cache_clear()
    decode_attention.kernel.cache_clear()
    case = TABLE["int8_pages"]
    q, cache, _ = tensors(case)
    assert torch.equal(run(case), attend_cache(case.spec, q.float(), cache).output.to(q.dtype))
    decode_attention.ready.cache_clear()
    decode_attention.kernel.cache_clear()


def test_what_does_not_fit():
    own, paged = TABLE["own_lengths"], TABLE["pages"]
    for case, changes, message in (
        (own, {"lengths": torch.tensor([80, 33, 81], dtype=torch.int32)}, "lengths lie outside of 0 … 80"),
        (own, {"lengths": torch.tensor([80, 33, -1], dtype=torch.int32)}, "lengths lie outside"),
        (paged, {"pages": tensors(paged)[1].pages + 100}, "pages lie outside"),
        (paged, {"pages": None}, "the spec's cache is paged and pages are not given"),
        (own, {"v": torch.randn(3, 2, 79, 16)}, "k has 80 rows, v 79"),
    ):
        with pytest.raises(InputMismatch, match=message):
            run(case, replace(tensors(case)[1], **changes))
    with pytest.raises(InputMismatch, match="the normaliser is sigmoid, not softmax"):
        run(replace(TABLE["plain"], spec="sigmoid"))
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 30, 16)
    for given, message in (([], "0 operands were given, and the spec has 1"), ([torch.ones(1, 20)], "is read from 0 to 29")):
        with pytest.raises(InputMismatch, match=message):
            torch.ops.attnopt.tvm_decode(q, k, k, *[None] * 6, given, "softmax load(seen, b, k)")


@NEEDS_TVM
def test_caches_in_other_strides():
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 30, 2, 16).transpose(1, 2), torch.randn(2, 2, 16, 30).mT
    line = "softmax scale(0.25)"
    found = torch.ops.attnopt.tvm_decode(q, *pack_cache(line, k, v).parts, [], line)
    torch.testing.assert_close(found, attend_cache(line, q, pack_cache(line, k, v)).output, atol=1e-5, rtol=1e-5)


def test_a_cache_that_grows_looks_its_kernel_up_once():
    """Numbers alone: its length is no part of what is looked up. What does not fit is told as before."""
    decode_attention.ready.cache_clear()
    q = torch.randn(1, 4, 1, 16)
    for length in (5, 6, 7, 40):
        k, v = torch.randn(1, 2, length, 16), torch.randn(1, 2, length, 16)
        made = decode_attention.run_tvm_decode(q, Cache(k, v), [], "softmax scale(0.25)")
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25, enable_gqa=True)
        assert torch.allclose(made, expected, atol=1e-5)
    assert decode_attention.ready.cache_info().misses == 1
    with pytest.raises(InputMismatch):
        decode_attention.run_tvm_decode(q, Cache(k, v[:, :, 1:]), [], "softmax scale(0.25)")
