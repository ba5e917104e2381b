"""Random models in which projections can be merged, and in which what is added to scores is made of constants.

WideHead    two query heads on one key head, all as wide as the model, no positions inside: k and v merge into q and o
Windowed    windows of 7 by 7 places as Swin has them: a table looked up by distance, then a mask of shifted windows, at every call
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PLACES = 49
SIDE = 7


class WideHead(nn.Module):
    """Multi-query attention without biases: x [B, L, width] -> [B, L, width]."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.width = width
        self.q, self.o = nn.Linear(width, heads * width, bias=False), nn.Linear(heads * width, width, bias=False)
        self.k, self.v = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


class Windowed(nn.Module):
    """x [B, 49, width] -> [B, 49, width]. The mask lets places see those of their own half alone, as in a shifted window."""

    def __init__(self, width: int, heads: int = 6) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * SIDE - 1) ** 2, heads))
        at = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None] + SIDE - 1  # [2, 49, 49], from 0
        self.register_buffer("index", (apart[0] * (2 * SIDE - 1) + apart[1]).reshape(-1))
        half = at[0] >= SIDE // 2
        self.register_buffer("mask", (half[:, None] != half) * -100.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = scores + self.table[self.index].view(PLACES, PLACES, self.heads).permute(2, 0, 1)[None]
        weights = (scores + self.mask).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Words, layers of one kind of attention with an MLP each, norms before both: input_ids [B, L] -> [B, L, width]."""

    def __init__(self, kind: type[nn.Module], width: int, layers: int, words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.attentions = nn.ModuleList(kind(width) for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return x
