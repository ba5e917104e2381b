"""The prefill kernel reads the tiles of a list, and no others: what stands in those is NaN."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen.emitted import load
from attnopt.codegen.triton.prefill import Form, emit, supports
from attnopt.codegen.triton.tiles import Tile
from attnopt.ir.reference import reference
from attnopt.ir.spec import parse


@pytest.mark.parametrize(
    ("mask", "tile"),
    [("", Tile(64, 64, 1, 1)), (" causal", Tile(64, 32, 1, 1, persistent=True)), (" causal & window(90)", Tile(32, 64, 1, 1))],
)
def test_reads_what_the_list_says(mask, tile):
    q, k, v = torch.randn(1, 2, 150, 16), torch.randn(1, 1, 150, 16), torch.randn(1, 1, 150, 16)
    tiles = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    tiles[:, :, :, 1] = False  # nobody visits the second block of keys
    tiles[..., 0] = True
    spec = parse(f"softmax scale(0.25){mask} blocks(64, 64, operand=t)")
    form = Form(16, 16, "float32", (("t", "bool"),))
    assert supports(spec, form) is None
    right = reference(spec, q.double(), k.double(), v.double(), t=tiles)
    if "window" not in mask:  # there some queries see nothing, and get the mean of all values
        k[:, :, 64:128] = v[:, :, 64:128] = torch.nan
    poisoned = torch.full((1, 2, 150, 16), torch.nan)
    found = load(emit(spec, form, tile)).attention(q, k, v, tiles, o=poisoned)
    torch.testing.assert_close(found.double(), right, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("mask", "clause", "tile"),
    [
        (" causal", "blocks(64, 64, operand=t, skip=5.0)", Tile(64, 64, 1, 1)),
        (" softcap(30.0) causal & window(90)", "blocks(128, 64, operand=t, skip=5.0, skip_rows=64)", Tile(64, 64, 1, 1)),
    ],
)
def test_values_of_late_tiles_are_not_read(mask, clause, tile):
    """Keys after the first 64 score far below those, whose queries have them all: nobody reads their values."""
    q, k, v = torch.randn(1, 2, 150, 16).abs(), torch.randn(1, 1, 150, 16), torch.randn(1, 1, 150, 16)
    k[:, :, :64] = k[:, :, :64].abs() + 2
    k[:, :, 64:] *= 0.1
    line = f"softmax scale(0.25){mask} {clause}"
    spec, form = parse(line), Form(16, 16, "float32", (("t", "bool"),))
    assert supports(spec, form) is None
    tiles = torch.ones(1, 2, -(-150 // spec.selection.count(0)), 3, dtype=torch.bool)
    right = reference(spec, q.double(), k.double(), v.double(), t=tiles)
    assert not torch.allclose(right, reference(line.replace("skip=5.0", "skip=inf"), q.double(), k.double(), v.double(), t=tiles))
    if "window" not in mask:  # there the last queries read keys after the first 64
        v[:, :, 64:] = torch.nan
    found = load(emit(spec, form, tile)).attention(q, k, v, tiles, o=torch.full((1, 2, 150, 16), torch.nan))
    torch.testing.assert_close(found.double(), right, atol=2e-5, rtol=2e-5)


def test_through_the_operator():
    q, k, v = torch.randn(1, 2, 150, 16), torch.randn(1, 1, 150, 16), torch.randn(1, 1, 150, 16)
    line = "softmax scale(0.25) causal block_topk(64, 2)"
    right = reference(line, q.double(), k.double(), v.double())
    found = torch.ops.attnopt.triton_sparse(q, k, v, [], line)
    torch.testing.assert_close(found.double(), right, atol=2e-5, rtol=2e-5)
