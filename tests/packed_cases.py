"""Packed batches: sequences of many lengths, some empty, with what each of them gives on its own by the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.reference import attend
from attnopt.ir.spec import parse


@dataclass(frozen=True)
class Packed:
    """q_len and kv_len of each sequence; operands by name: their shapes, with the batch first where they have one."""

    spec: str
    q_len: tuple[int, ...]
    kv_len: tuple[int, ...]
    heads: tuple[int, int] = (2, 1)
    width: tuple[int, int] = (16, 16)
    operands: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def tensors(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """q, k, v, q_starts, k_starts, and the operands."""
        made = torch.Generator().manual_seed(len(self.spec))
        rows, keys = sum(self.q_len), sum(self.kv_len)
        shapes = (
            (rows, self.heads[0], self.width[0]),
            (keys, self.heads[1], self.width[0]),
            (keys, self.heads[1], self.width[1]),
        )
        starts = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (self.q_len, self.kv_len)]
        operands = {name: torch.randn(shape, generator=made) for name, shape in self.operands}
        return [*(torch.randn(shape, generator=made) for shape in shapes), *starts], operands

    def wanted(self) -> tuple[Tensor, Tensor]:
        """[rows, H, E] and the log-sum-exp [H, rows], sequence by sequence in float64; zeros where a query has no keys."""
        (q, k, v, q_starts, k_starts), operands = self.tensors()
        o, lse = torch.zeros((*q.shape[:2], v.shape[2])).double(), torch.full((q.shape[1], q.shape[0]), -torch.inf).double()
        for b in range(len(self.q_len)):
            rows, keys = slice(*q_starts[b : b + 2]), slice(*k_starts[b : b + 2])
            if self.q_len[b] and self.kv_len[b]:
                given = (x.double().transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
                own = {n: (x[b : b + 1] if x.ndim > 1 else x).double() for n, x in operands.items()}
                made = attend(parse(self.spec), *given, **own)
                o[rows], lse[:, rows] = made.output[0].transpose(0, 1), made.lse[0]
        return o, lse


PACKED = {
    "causal": Packed("softmax scale(0.25) causal", (17, 0, 40, 1), (17, 0, 40, 1)),
    "last_queries": Packed("softmax scale(0.25) offset(size(k) - size(q)) causal & window(9)", (7, 3, 5, 20, 0), (17, 3, 40, 33, 8)),
    "no_keys": Packed("softmax scale(0.25)", (3, 5, 16), (20, 0, 7)),
    "hidden_rows": Packed("softmax scale(0.25) k < q", (6, 18, 3), (6, 18, 0), width=(16, 80)),
    "by_sequence": Packed("softmax scale(0.25) add(load(slopes, h) * (k - q)) add(load(bias, b, k)) causal", (5, 19, 2), (5, 19, 2),
                          heads=(4, 2), width=(24, 16), operands=(("slopes", (4,)), ("bias", (3, 19)))),
    "normalised": Packed("softmax norm(rms) scale(0.25) causal", (18, 4), (18, 4)),
}  # fmt: skip
