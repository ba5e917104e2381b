"""The eager twin of decode.py and merge.py: the same shares of the same blocks of keys in plain PyTorch, and the same merge.

    attention(q, cache, "softmax scale(0.25) causal & window(20)", block_k=16, splits=3)   ->   o [B, H, Q, E], lse [B, H, Q]

Slow and obvious: each split visits its share of the blocks that any query sees and leaves a top, a sum of weights and weighted
values, or, where it saw nothing, the sum of its share of all values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.codegen.triton.kernels.prefill_eager import BlockGrid, scored, visited
from attnopt.ir.ranges import key_range
from attnopt.ir.evaluate import evaluate
from attnopt.ir.kv_cache import Cache, unpacked
from attnopt.ir.reference import query_offset
from attnopt.ir.spec import AttentionSpec, as_spec

Found = tuple[Tensor, Tensor, Tensor]


def attention(
    q: Tensor, cache: Cache, spec: AttentionSpec | str, *, block_k: int, splits: int, **operands: Tensor
) -> tuple[Tensor, Tensor]:
    """q [B, H, Q, D] and a cache -> [B, H, Q, E] and [B, H, Q], in q's dtype. For specs that the kernel supports."""
    parsed = as_spec(spec)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in unpacked(cache, parsed, q.dtype))
    lengths = [k.shape[2]] * len(q) if cache.lengths is None else cache.lengths.tolist()
    rows = [sequence(parsed, q, k[:, :, :n], v[:, :, :n], b, block_k, splits, operands) for b, n in enumerate(lengths)]
    return torch.stack([o for o, _ in rows]), torch.stack([lse for _, lse in rows])


def sequence(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, b: int, block_k: int, splits: int, operands: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """One sequence of the batch: [H, Q, E] and [H, Q]. All are computed, because operands may be read at any b."""
    (batch, heads, q_len, _), kv_len = q.shape, k.shape[2]
    offset = query_offset(spec, q_len, kv_len)
    blocks = list(visited(key_range(spec.mask), offset, offset + q_len - 1, q_len, kv_len, block_k))
    share, part = -(-len(blocks) // splits), -(-(-(-kv_len // block_k)) // splits) * block_k

    def grid(columns: Tensor) -> BlockGrid:
        return BlockGrid(batch, heads, q_len, kv_len, offset, rows=torch.arange(q_len), columns=columns)

    found: list[Found] = []
    for s in range(splits):
        b_top = q.new_full((batch, heads, q_len, 1), -torch.inf)
        b_sum, b_o = torch.zeros_like(b_top), q.new_zeros((*b_top.shape[:3], v.shape[3]))
        for i, edge in blocks[s * share : (s + 1) * share]:
            columns = torch.arange(i * block_k, min((i + 1) * block_k, kv_len))
            b_s = scored(spec, q @ k[:, :, columns].mT, grid(columns), operands)
            mask = spec.mask if edge else key_range(spec.mask).undecided
            if mask is not None:
                b_s = torch.where(evaluate(mask, grid(columns), operands).bool(), b_s, -torch.inf)
            b_new = torch.maximum(b_top, b_s.amax(-1, keepdim=True))
            b_safe = torch.where(b_new == -torch.inf, 0.0, b_new)
            b_p, b_decay = (b_s - b_safe).exp(), (b_top - b_safe).exp()
            b_sum, b_top, b_o = b_sum * b_decay + b_p.sum(-1, keepdim=True), b_new, b_o * b_decay + b_p @ v[:, :, columns]
        averaged = spec.mask is not None and spec.empty_row == "mean" and spec.sink is None
        rest = v[:, :, s * part : (s + 1) * part].sum(2, keepdim=True) if averaged else torch.zeros_like(b_o)
        found.append((b_top, b_sum, torch.where(b_sum == 0, rest, b_o)))
    b_sink = None if spec.sink is None else evaluate(spec.sink.expr(0), grid(torch.zeros(1, dtype=torch.long)), operands).to(q.dtype)
    o, lse = merged(found, b_sink, kv_len)
    return o[b], lse[b, :, :, 0]


def merged(found: list[Found], b_sink: Tensor | None, kv_len: int) -> tuple[Tensor, Tensor]:
    """What all splits found of a row, and its log-sum-exp."""
    tops, sums, parts = (torch.stack(x) for x in zip(*found, strict=True))
    top = tops.amax(0) if b_sink is None else torch.maximum(tops.amax(0), b_sink)
    safe = torch.where(top == -torch.inf, 0.0, top)
    weights = (tops - safe).exp()
    total = (weights * sums).sum(0) + (0.0 if b_sink is None else (b_sink - safe).exp())
    share = torch.where(total == 0, 1.0 / max(kv_len, 1), weights / torch.where(total == 0, 1.0, total))
    return (share * parts).sum(0), safe + total.log()
