"""Rotations are orthogonal, of every width, repeatable, and flat."""

from __future__ import annotations

import pytest
import torch

from attnopt.rounding.hadamard import block_width, hadamard, in_blocks, rotation


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 48, 64, 80, 192, 384, 768, 512])
def test_hadamard_matrices(order):
    matrix = hadamard(order)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(matrix.abs(), torch.full((order, order), order**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 7, 28, 100])
def test_orders_without_one(order):
    assert hadamard(order) is None or order == 100


@pytest.mark.parametrize("width", [7, 64, 192, 688])
def test_rotations(width):
    one, again, other = rotation(width, 3), rotation(width, 3), rotation(width, 4)
    torch.testing.assert_close(one @ one.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize(("width", "block"), [(192, 64), (384, 128), (512, 128), (48, 16), (24, None), (7, None)])
def test_blocks_divide(width, block):
    assert block_width(width) == block
    if block is not None:
        x, w = torch.randn(5, width, dtype=torch.float64), torch.randn(9, width, dtype=torch.float64)
        torch.testing.assert_close(in_blocks(x, block) @ in_blocks(w, block).T, x @ w.T, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(in_blocks(in_blocks(x, block), block), x, rtol=1e-12, atol=1e-12)
