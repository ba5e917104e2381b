"""attnopt::local_attention: torch's own kernel on chunks of queries, each beside the keys that the mask's band reaches.

    local_attention(q, k, v, [padding], "softmax scale(0.125) causal & window(512) & padding")
        ->   scaled_dot_product_attention(q [B·N, H, C, D], k [B·N, G, M, D], v [B·N, G, M, E], mask [B·N, 1|H, C, M])

Chunks are the batch of the kernel, so that time grows with the length and not with its square. How many there are depends on the
length; inside an operator of ours that is nobody's symbolic size, and an exported program holds at every length.

Source: "Longformer: The Long-Document Transformer" (sliding chunks).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from attnopt.ir.band import Band, Chunking, band, chunking, follows_distance
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Expr, conjuncts
from attnopt.ir.spec import AttentionSpec, parse


@dataclass(frozen=True, kw_only=True)
class ChunkedGrid(Grid):
    """Positions by chunk: indices are [B, N, H, C, M] with sizes of 1 where they do not vary. rows [N, C], keys [N, M]."""

    rows: Tensor
    keys: Tensor

    def index(self, name: str) -> Tensor:
        if name in ("q", "row"):
            return self.rows[None, :, None, :, None]
        if name == "k":
            return self.keys[None, :, None, None, :]
        length, axis = (self.batch, 0) if name == "b" else (self.heads, 2)
        return torch.arange(length, device=self.device).view([-1 if i == axis else 1 for i in range(5)])


@functools.lru_cache(maxsize=256)
def read(spec: str) -> tuple[AttentionSpec, Chunking]:
    parsed = parse(spec)
    return parsed, chunking(band(parsed.mask) or Band(0, 0))


def run_local(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], spec: str) -> Tensor:
    """q [B, H, L, D], k [B, G, L, D], v [B, G, L, E] -> [B, H, L, E]; tensors in the order of `parse(spec).operands`."""
    parsed, chunks = read(spec)
    batch, heads, length, _ = q.shape
    first = torch.arange(0, length, chunks.rows, device=q.device)[:, None]
    rows = (first + torch.arange(chunks.rows, device=q.device)).clamp(max=length - 1)
    places = first + torch.arange(-chunks.behind, chunks.keys - chunks.first - chunks.behind, device=q.device)
    if chunks.first:
        sinks = torch.arange(chunks.first, device=q.device).expand(len(first), -1)
        twice = (sinks >= places[:, :1]) & (sinks <= places[:, -1:])
        places = torch.cat([sinks.masked_fill(twice, -1), places], 1)
    keys = places.clamp(0, length - 1)
    grid = ChunkedGrid(batch, heads, length, length, 0, q.device, rows=rows, keys=keys)
    operands = dict(zip(parsed.operands, tensors, strict=True))
    near = Grid(batch, heads, chunks.rows, chunks.keys, chunks.behind, q.device, {"q": length, "k": length})

    def is_tile(expr: Expr) -> bool:
        return chunks.first == 0 and follows_distance(expr)

    def value(expr: Expr) -> Tensor:
        """On the grid of chunks; what follows the distance is one tile [B|1, 1, H|1, C, M] for all of them."""
        if not is_tile(expr):
            return evaluate(expr, grid, operands)
        tile = evaluate(expr, near, operands)
        return tile.expand(*(1,) * (4 - tile.ndim), *tile.shape).unsqueeze(1)

    near_parts = [p for p in conjuncts(parsed.mask) if is_tile(p)]
    far_parts = [p for p in conjuncts(parsed.mask) if not is_tile(p)]
    inside = (places == keys)[None, :, None, None, :]
    visible = [functools.reduce(Tensor.logical_and, (value(p).bool() for p in near_parts))] if near_parts else []
    visible.append(functools.reduce(Tensor.logical_and, (value(p).bool() for p in far_parts), inside))
    # The tile and the rest meet once, as numbers: each is small beside their product.
    mask = sum(torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~x, -torch.inf) for x in visible)
    assert isinstance(mask, Tensor)
    added = mask
    for bias in parsed.biases:
        added = added + value(bias).to(q.dtype)
    out = F.scaled_dot_product_attention(
        gathered(q, rows),
        gathered(k, keys),
        gathered(v, keys),
        attn_mask=added.expand(batch, *added.shape[1:]).flatten(0, 1),
        scale=parsed.scale,
        enable_gqa=heads != k.shape[1],
    )
    out = in_rows(out.unflatten(0, (batch, -1)), length)
    seen = mask.amax(-1, keepdim=True) == 0
    if bool(seen.all()):
        return out
    return torch.where(in_rows(seen.expand(batch, -1, -1, chunks.rows, 1), length), out, empty_rows(parsed, v, heads))


def gathered(x: Tensor, positions: Tensor) -> Tensor:
    """[B, H, L, D] at positions [N, P] as [B·N, H, P, D]."""
    return x.transpose(1, 2)[:, positions].flatten(0, 1).transpose(1, 2)


def in_rows(x: Tensor, length: int) -> Tensor:
    """[B, N, H, C, E] as [B, H, L, E], without the rows that filled the last chunk."""
    return x.transpose(2, 3).flatten(1, 2)[:, :length].transpose(1, 2)


def empty_rows(spec: AttentionSpec, v: Tensor, heads: int) -> Tensor:
    """What a row without visible key gets: zero, or the mean of all values, [B, H, 1, E]."""
    if spec.empty_row != "mean":
        return torch.zeros((), dtype=v.dtype, device=v.device)
    return v.mean(2, keepdim=True).repeat_interleave(heads // v.shape[1], 1)


@torch.library.custom_op("attnopt::local_attention", mutates_args=())
def local_operator(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    """See `run_local`. Inference only: no gradient is defined."""
    return run_local(q, k, v, operands, spec).contiguous()


@local_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))
