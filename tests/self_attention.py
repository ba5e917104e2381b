"""One block of self-attention written out by hand, with four linear layers: the smallest model that a user could have."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SPEC = "softmax heads(4) width(16) scale(0.25)"


class SelfAttention(nn.Module):
    """x [B, L, 64], seen bool [B, L] -> {"hidden": [B, L, 64], "first": [B, 64]}"""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, seen: Tensor | None = None, *, many: bool = True) -> dict[str, Tensor] | Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None, None], torch.finfo(scores.dtype).min)
        hidden = self.o((self.dropout(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2))
        return {"hidden": hidden, "first": hidden[:, 0]} if many else hidden


def example(batch: int = 2, length: int = 6) -> dict[str, Tensor]:
    """Inputs by name; the last two keys are hidden in the last row of the batch."""
    seen = torch.ones(batch, length, dtype=torch.bool)
    seen[-1, -2:] = False
    return {"x": torch.randn(batch, length, 64), "seen": seen}
