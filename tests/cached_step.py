"""One decoding step of a small attention on a cache that comes and goes as tensors."""

from __future__ import annotations

import torch
from torch import nn


class Step(nn.Module):
    """Two query heads on each of two key heads; keys and values come and go as a tuple of tensors."""

    def __init__(self, dtype: torch.dtype = torch.float32, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width = width
        self.q, self.k, self.v, self.o = (nn.Linear(4 * width, n * width, bias=False, dtype=dtype) for n in (4, 2, 2, 4))

    def rows(self, x):
        return [p(x).view(*x.shape[:2], -1, self.width).transpose(1, 2) for p in (self.q, self.k, self.v)]

    def finished(self, x, attended):
        return x + self.o(attended.transpose(1, 2).reshape(x.shape))

    def forward(self, x, past):
        q, k, v = self.rows(x)
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.finished(x, nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)), (k, v)


def example(dtype=torch.float32, width=8, past=5, new=1):
    torch.manual_seed(1)
    channels = torch.ones(width, dtype=dtype)
    channels[3], channels[5] = 8, 0.1
    held = torch.randn(2, 2, past, width, dtype=dtype) * channels + channels, torch.randn(2, 2, past, width, dtype=dtype)
    held[1][1, 0, -1] = 0.5  # a row without any range
    return torch.randn(2, new, 4 * width, dtype=dtype), held
