"""A list of tiles in the prefill family: what fits it, the eager twin, and the compiler for a machine that is not here."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen.triton.compile import Compiled, compile_for
from attnopt.codegen.triton.configurations import configurations
from attnopt.codegen.triton.kernels.prefill_eager import attention
from attnopt.codegen.triton.listed import fits
from attnopt.codegen.triton.prefill import Form, supports
from attnopt.codegen.triton.tiles import ARCHITECTURES
from attnopt.ir.reference import reference
from attnopt.ir.spec import parse

FORM = Form(64, 64, "float16", (("t", "bool"),))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_every_architecture_has_tiles_for_a_list(architecture, width):
    spec = parse("softmax scale(0.125) causal blocks(64, 64, operand=t)")
    found = configurations(spec, Form(width, width, "float16", FORM.operands), architecture)
    assert found
    assert all(fits(tile, spec.selection) and not tile.specialised for tile in found)


@pytest.mark.parametrize(
    "rest", ["& load(each, b, h, row, k // 64) blocks(128, 64, operand=t)", "blocks(128, 64, operand=t, skip=20.0, skip_rows=64)"]
)
def test_compiles_for_hopper(rest):
    spec = parse(f"softmax scale(0.125) causal {rest}")
    form = Form(64, 64, "float16", tuple((name, "bool") for name in spec.operands))
    assert supports(spec, form) is None
    tile = next(tile for tile in configurations(spec, form, "sm_90") if tile.block_q == 64)
    made = compile_for(spec, form, "sm_90", tile)
    assert isinstance(made, Compiled)
    assert made.tensor_cores == ("wgmma.mma_async",)
    assert made.refusal() is None


@pytest.mark.parametrize("mask", ["", " causal", " causal & window(20)"])
def test_the_eager_twin(mask):
    q, k, v = torch.randn(1, 2, 40, 8).double(), torch.randn(1, 1, 40, 8).double(), torch.randn(1, 1, 40, 8).double()
    tiles = torch.rand(1, 2, 5, 5) < 0.4
    line = f"softmax scale(0.25){mask} blocks(8, 8, operand=t)"
    found = attention(q, k, v, line, block_q=8, block_k=4, t=tiles)
    torch.testing.assert_close(found, reference(line, q, k, v, t=tiles), atol=1e-9, rtol=1e-9)


def test_the_eager_twin_skips_values():
    q, k, v = torch.randn(1, 2, 40, 8).double().abs(), torch.randn(1, 1, 40, 8).double(), torch.randn(1, 1, 40, 8).double()
    k[:, :, :8] = k[:, :, :8].abs() + 6
    k[:, :, 16:] *= 0.1
    tiles = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    line = "softmax scale(0.25) causal blocks(16, 8, operand=t, skip=3.0, skip_rows=8)"
    right = reference(line, q, k, v, t=tiles)
    assert not torch.allclose(right, reference(line.replace("3.0", "inf"), q, k, v, t=tiles))
    v[:, :, 16:] = torch.where(torch.rand(24, 8) < 0.5, v[:, :, 16:], 1e3)  # what is skipped is not there
    torch.testing.assert_close(attention(q, k, v, line, block_q=8, block_k=8, t=tiles), right, atol=1e-9, rtol=1e-9)
    with pytest.raises(ValueError, match="skipped by blocks of"):
        attention(q, k, v, line, block_q=16, block_k=8, t=tiles)


def test_refusals():
    for line, form, why in (
        ("softmax blocks(64, 32, operand=t)", FORM, "no multiples of 64 x 64"),
        ("softmax blocks(0, 64, operand=t)", FORM, "no multiples of 64 x 64"),
        (
            "softmax blocks(192, 64, operand=t, skip=9.0)",
            FORM,
            "64 or 128 queries, a part of a tile, and as many keys: not of 192 x 64",
        ),
        ("softmax blocks(64, 64, operand=t, skip=9.0, skip_rows=128)", FORM, "not of 128 x 64"),
        ("softmax top_keys(4)", Form(64, 64), "chooses keys from the scores"),
        ("softmax blocks(64, 64, operand=t)", Form(64, 64, "float16", FORM.operands, packed=True), "no list of tiles"),
    ):
        found = supports(parse(line), form)
        assert found is not None and why in found.reason
