"""The emitted decode kernels compute what the reference does, in Triton's interpreter, into outputs that hold NaN before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decode_cases import TABLE, DecodeCase, exact, tensors, tolerance

from attnopt.codegen.emitted import load
from attnopt.codegen.triton.decode import emit, supports
from attnopt.codegen.triton.decode_attention import decode_attention, form_of, run_decode
from attnopt.codegen.triton.tiles import Tile
from attnopt.errors import InputMismatch
from attnopt.ir.kv_cache import Cache, attend_cache, pack_cache
from attnopt.ir.spec import parse


def run(case, splits, tile=Tile(16, 32, 1, 1), lse=True):
    """The kernel's own results; the splits are those of the file, and so is the order of its arguments."""
    spec, (q, cache, rest) = parse(case.spec), tensors(case)
    operands = {name: rest[name] for name in spec.operands}
    form = form_of(q, cache, operands, q.dtype, lse, spec)
    assert supports(spec, form) is None
    held = (cache.k_scales, cache.k_zeros, cache.v_scales, cache.v_zeros, cache.pages, cache.lengths)
    poisoned = torch.full((*q.shape[:3], form.value_width), torch.nan, dtype=q.dtype)
    given = (q, cache.k, cache.v, *operands.values(), *(x for x in held if x is not None))
    return load(emit(spec, form, tile)).attention(*given, o=poisoned, splits=splits)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", [name for name, case in TABLE.items() if case.dtype != "bfloat16"])
def test_computes_what_the_reference_does(name):
    case = TABLE[name]
    allowed = tolerance(case)
    o, lse = run(case, splits=2)
    torch.testing.assert_close(o.double(), exact(case).output, atol=allowed, rtol=allowed)
    torch.testing.assert_close(lse.double(), exact(case).lse, atol=allowed, rtol=allowed)


@pytest.mark.parametrize("name", [name for name, case in TABLE.items() if case.dtype == "bfloat16"])
def test_bfloat16_through_the_operator(name):
    case = TABLE[name]
    q, cache, rest = tensors(case)
    found = decode_attention(q, cache, case.spec, **{name: rest[name] for name in parse(case.spec).operands})
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact(case).output, atol=tolerance(case), rtol=tolerance(case))


def test_more_splits_than_blocks():
    """Some find nothing."""
    case = TABLE["window_and_global"]
    torch.testing.assert_close(run(case, 40)[0].double(), exact(case).output, atol=2e-5, rtol=2e-5)


def test_rows_of_several_blocks():
    case = DecodeCase("softmax scale(0.25) offset(size(k) - size(q)) causal", heads=(10, 2), lengths=(5, 40))
    torch.testing.assert_close(run(case, 2)[0].double(), exact(case).output, atol=2e-5, rtol=2e-5)


def test_small_values_in_half_precision():
    """float16 has no numbers below 6e-8: weights times steps of small values must not become zero."""
    q, k, v = torch.randn(1, 2, 1, 16).half(), torch.randn(1, 1, 64, 16).half(), (torch.randn(1, 1, 64, 16) * 1e-3).half()
    line = "softmax scale(3.0) cache(k=int8, v=int8)"
    cache = pack_cache(line, k, v)
    right = attend_cache(line, q.double(), cache).output
    torch.testing.assert_close(decode_attention(q, cache, line).double(), right, atol=3e-6, rtol=4e-3)


def test_what_lies_beyond_a_length_is_not_read():
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 16)
    k[:, :, 21:], v[:, :, 21:] = torch.nan, torch.nan
    cache = Cache(k, v, lengths=torch.tensor([21]))
    right = attend_cache("softmax", q.double(), Cache(k[:, :, :21].double(), v[:, :, :21].double())).output
    torch.testing.assert_close(decode_attention(q, cache, "softmax").double(), right, atol=2e-5, rtol=2e-5)


def test_no_gradients():
    q, k = torch.randn(1, 2, 1, 16, requires_grad=True), torch.randn(1, 2, 9, 16)
    with pytest.raises(InputMismatch, match="have no gradient"):
        decode_attention(q, Cache(k, k), "softmax")
    with torch.no_grad():
        assert decode_attention(q, Cache(k, k), "softmax").isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pages": torch.zeros(1, 1, dtype=torch.int32)}, "pages are given, but the spec's cache is not paged"),
        ({"k": torch.zeros(1, 1, 9, 8)}, r"k \[1, 1, 9, 8\] has no rows of 16, which hold 16 channels as int8"),
        ({"k": torch.zeros(1, 1, 9, 16)}, "k is torch.float32, and int8 is kept as int8"),
        ({"k_scales": None}, "k_scales are missing"),
        ({"v_zeros": torch.zeros(1, 1, 9, 1)}, r"v_zeros \[1, 1, 9, 1\] should be \[1, 1, 8, 1\]"),
        ({"lengths": torch.zeros(2, dtype=torch.int32)}, r"lengths \[2\] of torch.int32 are not whole numbers for 1 sequences"),
    ],
)
def test_a_cache_that_does_not_fit(change, message):
    line = "softmax cache(k=int8, v=int8)"
    cache = pack_cache(line, torch.randn(1, 1, 8, 16), torch.randn(1, 1, 8, 16))
    with pytest.raises(InputMismatch, match=message):
        run_decode(torch.randn(1, 2, 1, 16), replace(cache, **change), [], parse(line))


def test_operators_are_ones_that_torch_can_trace():
    q, k, table = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 9, 16), torch.randn(2)
    given = (q, k, k, None, None, None, None, None, torch.tensor([7]), [table], "softmax sink(load(table, h))")
    for operator in (torch.ops.attnopt.triton_decode.default, torch.ops.attnopt.triton_decode_lse.default):
        told = torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))
        assert set(told.values()) == {"SUCCESS"}
