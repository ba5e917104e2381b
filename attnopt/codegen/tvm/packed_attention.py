"""attnopt::tvm_attention_packed: sequences of any lengths, one after the other, each by the kernel for many queries, without padding.

    tvm_attention_packed(q, k, v, q_starts, k_starts, [], "softmax scale(0.1) causal")
        q [rows, H, D], k [keys, G, D], v [keys, G', E], q_starts and k_starts int32 [B + 1] from 0 on   ->   o [rows, H, E]

The meaning is that of attnopt::triton_attention_packed. A call of a kernel costs microseconds on a CPU, so there is one for each sequence,
on views of the packed tensors; all calls are of one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.triton.packed_attention import check_packed
from attnopt.codegen.triton.packed_sequences import reference_packed, sequences
from attnopt.codegen.tvm.tiles import MANY
from attnopt.codegen.tvm.tvm_attention import call, check, read, ready, rows, with_rows
from attnopt.errors import InputMismatch
from attnopt.ir.site import Refusal


def run_tvm_packed(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, tensors: Sequence[Tensor], spec: str, lse: bool = False
) -> Any:
    """-> o [rows, H, E], with lse also the log-sum-exp float32 [H, rows]. A query whose sequence has no keys gets zeros.

    Operands that are read by `b` have a row for each sequence. Raises InputMismatch as `run_tvm` does.
    """
    parsed = read(spec)
    check_packed(parsed, q, k, v, q_starts, k_starts)
    if parsed.selection is not None:
        raise InputMismatch(
            "a list of blocks is of one length", where=spec, next_move="Call attnopt::tvm_attention for each sequence."
        )
    longest = int(q_starts.diff().max())
    dtypes = tuple(x.dtype for x in tensors)
    found = ready(spec, q.dtype, q.shape[2], v.shape[2], dtypes, lse, min(max(longest, 1), MANY))
    operands = dict(zip(parsed.operands, tensors, strict=True))
    if isinstance(found.kernel, Refusal) or (parsed.sink is not None and not bool(k_starts.diff().all())):  # the sink alone
        made = reference_packed(parsed, q.float(), k.float(), v.float(), q_starts, k_starts, operands)
        return (made.output.to(q.dtype), made.lse) if lse else made.output.to(q.dtype)
    o = q.new_zeros((*q.shape[:2], v.shape[2]))
    sums = torch.full((q.shape[1], q.shape[0]), -torch.inf)
    for one in sequences(parsed, q, k, v, q_starts, k_starts, operands):
        given = [one.operands[name] for name in parsed.operands]
        if one.k.shape[2]:
            check(spec, one.q.shape, one.k.shape, one.v.shape, q.device.type, tuple(x.shape for x in given))
            outputs = (o[one.rows].transpose(0, 1)[None], *[sums[None, :, one.rows]] * lse)
            call(found.kernel, (rows(one.q), rows(one.k), rows(one.v), *with_rows(given, found.gains), *outputs), spec)
    return (o, sums) if lse else o
