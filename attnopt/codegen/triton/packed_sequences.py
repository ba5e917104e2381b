"""A packed batch taken apart: the meaning of a kernel that works on all sequences at once is that of each alone.

q [5, H, D], q_starts [0, 3, 3, 5]   ->   rows 0 … 2, no rows, rows 3 … 4, each as [1, H, rows, D]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.codegen.expressions import loads_of
from attnopt.codegen.triton.prefill import expressions
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Index
from attnopt.ir.reference import Attended, attend
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class Sequence:
    """Its rows in the packed output, its q [1, H, Q, D], k and v, and its slices of operands that are read by batch."""

    rows: slice
    q: Tensor
    k: Tensor
    v: Tensor
    operands: dict[str, Tensor]


def sequences(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, operands: Mapping[str, Tensor]
) -> Iterator[Sequence]:
    """Those that have queries. q [rows, H, D], k [keys, G, D], v [keys, G', E]; starts [B + 1]."""
    by_batch = {
        (x.operand, at) for e in expressions(spec) for x in loads_of(e) for at, i in enumerate(x.indices) if i == Index("b")
    }
    firsts, key_firsts = q_starts.tolist(), k_starts.tolist()
    for b in range(len(firsts) - 1):
        rows, keys = slice(firsts[b], firsts[b + 1]), slice(key_firsts[b], key_firsts[b + 1])
        if firsts[b] == firsts[b + 1]:
            continue
        own = dict(operands)
        for name, at in by_batch:
            own[name] = own[name].narrow(at, b, 1)
        one_q, one_k, one_v = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
        yield Sequence(rows, one_q, one_k, one_v, own)


def reference_packed(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, operands: Mapping[str, Tensor]
) -> Attended:
    """`attend` of each sequence: output [rows, H, E], lse [H, rows], no weights. Without keys a query gets zeros."""
    output, lse = q.new_zeros((*q.shape[:2], v.shape[2])), q.new_full((q.shape[1], q.shape[0]), -torch.inf)
    for one in sequences(spec, q, k, v, q_starts, k_starts, operands):
        if one.k.shape[2] > 0:
            made = attend(spec, one.q, one.k, one.v, **one.operands)
            output[one.rows], lse[:, one.rows] = made.output[0].transpose(0, 1), made.lse[0].to(lse.dtype)
        elif spec.sink is not None:
            sink = evaluate(spec.sink.expr(0), Grid(1, q.shape[1], one.q.shape[2], 0), one.operands)
            lse[:, one.rows] = sink.to(lse.dtype).expand(1, q.shape[1], one.q.shape[2], 1)[0, :, :, 0]
    return Attended(output, output.new_empty(0), lse)
