"""One decoding step of a small attention on a cache that comes and goes as tensors."""

from __future__ import annotations

import torch
from torch import nn


class Step(nn.Module):
    """Two query heads on each of two key heads; keys and values come and go as a tuple of tensors."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(32, n, bias=False, dtype=dtype) for n in (32, 16, 16, 32))

    def rows(self, x):
        return [p(x).view(*x.shape[:2], -1, 8).transpose(1, 2) for p in (self.q, self.k, self.v)]

    def finished(self, x, attended):
        return x + self.o(attended.transpose(1, 2).reshape(x.shape))

    def forward(self, x, past):
        q, k, v = self.rows(x)
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return self.finished(x, nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)), (k, v)


def example(dtype=torch.float32):
    torch.manual_seed(1)
    channels = torch.tensor([1.0, 1, 1, 8, 1, 1, 0.1, 1], dtype=dtype)
    past = (torch.randn(2, 2, 5, 8, dtype=dtype) * channels + channels, torch.randn(2, 2, 5, 8, dtype=dtype))
    past[1][1, 0, 2] = 0.5  # a row without any range
    return torch.randn(2, 1, 32, dtype=dtype), past
