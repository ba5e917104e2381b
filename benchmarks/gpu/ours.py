"""attnopt's kernels as contenders: the operators that optimised models call.

Documents are packed: each is a sequence of its own, and no mask is read. Beside it stands the kernel that reads which document a
position is in, as a model does whose texts are padded into rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import attnopt.operators  # noqa: F401  (registers them)
from attnopt.ir.spec import parse
from gpu.case import Case, Data

OURS, MASKED = "attnopt", "attnopt masked"
Prepare = Callable[[Case, Data], Callable[[], Tensor]]


def kernels(case: Case) -> dict[str, Prepare]:
    """The one that counts, and others of ours that are told beside it."""
    if case.kind == "decode":
        return {OURS: decoding}
    return {OURS: packed, MASKED: padded} if case.mask == "documents" else {OURS: padded}


def padded(case: Case, data: Data) -> Callable[[], Tensor]:
    spec, operands = case.spec, [data.operands[name] for name in parse(case.spec).operands]
    return lambda: torch.ops.attnopt.triton_attention(data.q, data.k, data.v, operands, spec)


def packed(case: Case, data: Data) -> Callable[[], Tensor]:
    spec = in_pieces(case)
    q, k, v = data.rows
    starts = data.starts

    def call() -> Tensor:
        out = torch.ops.attnopt.triton_attention_packed(q, k, v, starts, starts, [], spec)
        return out.unflatten(0, (case.batch, -1)).transpose(1, 2)

    return call


def in_pieces(case: Case) -> str:
    """The spec of one document: where each is a sequence of its own, none sees another."""
    return case.spec.replace("causal & document", "causal")


def decoding(case: Case, data: Data) -> Callable[[], Tensor]:
    spec, parts = case.spec, data.cache.parts
    return lambda: torch.ops.attnopt.triton_decode(data.q, *parts, [], spec)
