"""A mask that differs by window, where windows and images share the batch dimension: repeated over the images, not over the windows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnopt

WINDOWS, TOKENS, HEADS, WIDTH = 4, 8, 2, 16


class ShiftedWindows(nn.Module):
    """Attention inside of windows [images * windows, tokens, heads * width]; regions of a window do not see each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        labels = torch.randint(0, 2, (WINDOWS, TOKENS))
        self.register_buffer("mask", torch.where(labels[:, :, None] == labels[:, None], 0.0, -100.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        q, k, v = self.qkv(x).view(rows, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)).view(rows // WINDOWS, WINDOWS, HEADS, TOKENS, TOKENS)
        scores = scores + self.mask[None, :, None]
        weights = scores.view(rows, HEADS, TOKENS, TOKENS).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(rows, TOKENS, HEADS * WIDTH)


@pytest.mark.parametrize("images", [1, 3])
def test_the_mask_of_each_window(images):
    model = ShiftedWindows().eval()
    x = torch.randn(images * WINDOWS, TOKENS, HEADS * WIDTH)
    fast = attnopt.optimize(model, (x,), select="always", dynamic_shapes=({},))
    (site,) = fast.report.sites
    assert site.kernel == "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_view_of_what_a_kernel_lays_out_differently():
    """The model views the transposed output, which holds for its own strides only."""

    class Model(nn.Module):
        def forward(self, q, k, v):
            out = torch.matmul((q @ k.transpose(-2, -1)).softmax(-1), v)  # [B, H, L, D], contiguous
            return out.view(out.shape[0] * HEADS, -1, WIDTH)

    q, k, v = (torch.randn(2, TOKENS, HEADS, WIDTH).transpose(1, 2) for _ in range(3))
    fast = attnopt.optimize(Model(), (q, k, v), select="always", dynamic_shapes=({}, {}, {}))
    assert fast.report.fused == 1
    torch.testing.assert_close(fast(q, k, v), Model()(q, k, v), rtol=1e-5, atol=1e-5)


def test_a_model_that_draws_random_numbers_is_verified_from_one_seed():
    class Model(nn.Module):
        def forward(self, q, k, v):
            noise = torch.rand(q.shape[0], 1, 1, q.shape[-1])
            return ((q + noise) @ k.transpose(-2, -1)).softmax(-1) @ v

    q, k, v = (torch.randn(2, HEADS, TOKENS, WIDTH) for _ in range(3))
    fast = attnopt.optimize(Model(), (q, k, v), select="always", dynamic_shapes=({}, {}, {}))
    assert fast.report.difference.max_rel < 1e-5
