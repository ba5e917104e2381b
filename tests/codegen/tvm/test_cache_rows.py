"""Rows that are written into a cache are those that `pack` makes, to the last bit."""

from __future__ import annotations

import pytest
import torch

import attnopt  # noqa: F401  (registers the operator)
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.cache_rows import emit, form_of, read
from attnopt.codegen.tvm.cpu import named
from attnopt.ir.packing import Packed, pack

NEEDS_TVM = pytest.mark.skipif(missing() is not None, reason=str(missing()))
FORMS = [
    "k=int8, v=int8",
    "k=int8, v=int8, levels=symmetric, clip=0.9",
    "k=int4, v=int4, group=16, scales=fp16",
    "k=int2, v=int2, group=16, levels=symmetric, scales=fp16",
    "k=int4, v=int8, group=16, scales=bf16",  # by torch
    "k=fp8, v=fp8",
]


def written(x, cache, side, first, room):
    due = pack(x, read(cache), side)
    into = Packed(*(None if p is None else torch.zeros(*p.shape[:2], room, p.shape[3]).to(p.dtype) for p in parts(due)))
    torch.ops.attnopt.cache_rows(x, into.codes, into.scales, into.zeros, first, cache, side)
    return due, into


def parts(packed):
    return packed.codes, packed.scales, packed.zeros


@NEEDS_TVM
@pytest.mark.parametrize("line", FORMS)
def test_they_are_those_of_pack(line):
    cache, random = f"cache({line})", torch.Generator().manual_seed(0)
    for size in (1.0, 1e-3, 1e30, 0.0, 1e-44):
        x = size * torch.randn(2, 5, 3, 32, generator=random).transpose(1, 2)  # as a projection leaves them
        x[0, 0, 0] = 2.5  # a row without a range
        due, into = written(x, cache, "v", 3, 9)
        for right, found in zip(parts(due), parts(into), strict=True):
            if right is not None:
                assert torch.equal(found[:, :, 3:8].float(), right.float()), size
                assert not found[:, :, :3].float().any() and not found[:, :, 8:].float().any()


def test_which_rows_torch_writes():
    for line, why in (
        ("k=fp8, v=fp8", "fp8 rows"),
        ("k=int8, v=int8, k_axis=channel", "over tokens"),
        ("k=int8, v=int8, group=24", "no whole groups"),
        ("k=int4, v=int8, scales=bf16", "bf16"),
    ):
        assert why in form_of(f"cache({line})", "k", 32).reason
    assert form_of("cache(k=int8, v=int8)", "k", 32) == form_of("cache(k=int4, v=int8)", "v", 32)  # one kernel


@pytest.mark.parametrize("x", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_named(x):
    rows = torch.randn(1, 2, 1, 16)
    rows[0, 1, 0, 3] = x
    into = pack(torch.zeros_like(rows), read("cache(k=int8, v=int8)"), "k")
    with pytest.raises(ValueError, match=f"k is {x} in sequence 0, head 1, token 0, channel 3"):
        torch.ops.attnopt.cache_rows(rows, *parts(into), 0, "cache(k=int8, v=int8)", "k")


def test_doubles_are_rounded_as_doubles():
    x = torch.randn(1, 2, 4, 16, dtype=torch.float64)
    due, into = written(x, "cache(k=int8, v=int8)", "v", 0, 4)
    assert into.scales.dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(parts(due), parts(into), strict=True))


def test_the_file_says_what_it_is_for():
    text = emit(form_of("cache(k=int4, v=int8, group=16)", "k", 32), named("znver4"))
    assert text.startswith('"""Rows of 32 channels to int4, groups of 16 share a scale in float32, on znver4."""')
    assert "GROUPS = 2" in text and "SYMMETRIC" not in text
