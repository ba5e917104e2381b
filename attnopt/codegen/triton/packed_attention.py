"""attnopt::triton_attention_packed: sequences of any lengths, one after the other, in one kernel that reads no padding.

    triton_attention_packed(q, k, v, q_starts, k_starts, [], "softmax scale(0.1) causal")
        q [rows, H, D], k [keys, G, D], v [keys, G', E], q_starts and k_starts int32 [B + 1] from 0 on   ->   o [rows, H, E]

Positions, lengths and masks of the spec are those within a sequence; an operand that is read by `b` has a row for each sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.triton.availability import interpreted, missing
from attnopt.codegen.triton.packed_sequences import reference_packed
from attnopt.codegen.triton.triton_attention import architecture, form_of, kernel, operands_of, refusal
from attnopt.errors import InputMismatch
from attnopt.ir.reference import check_shapes
from attnopt.ir.spec import AttentionSpec


def run_packed(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, tensors: Sequence[Tensor], spec: AttentionSpec,
    lse: bool = False, work: Any = None,
) -> Any:  # fmt: skip
    """q [rows, H, D], k [keys, G, D], v [keys, G', E] -> o [rows, H, E], with lse also the log-sum-exp float32 [H, rows].

    q_starts, k_starts int32 [B + 1]: sequence b has rows q_starts[b] … q_starts[b + 1] - 1 of q. tensors in the order of
    `spec.operands`. work: what the kernel's `schedule` made of the same lengths for another layer. A query whose sequence has no
    keys gets zeros. Raises InputMismatch as `run_triton` does; on a CPU, where nothing interprets, it runs the reference.
    """
    check_packed(spec, q, k, v, q_starts, k_starts)
    operands = dict(zip(operands_of(spec), tensors, strict=True))
    form = replace(form_of(q, v.shape[2], operands, lse), packed=True)
    if (refused := refusal(spec, form)) is not None:
        raise InputMismatch(str(refused), where=str(spec), next_move="Pad the sequences and call attnopt.attention(…).")
    if q.device.type == "cpu" and not interpreted():
        made = reference_packed(spec, q.float(), k.float(), v.float(), q_starts, k_starts, operands)
        return (made.output.to(q.dtype), made.lse) if lse else made.output.to(q.dtype)
    if (reason := missing()) is not None:
        raise InputMismatch(reason, where=str(spec), next_move="pip install triton, or choose another kernel.")
    emulated = interpreted() and q.dtype == torch.bfloat16
    if emulated:
        form = replace(form, dtype="float32")
    given = (q.float(), k.float(), v.float()) if emulated else (q, k, v)
    module = kernel(spec, form, architecture(q.device))
    starts = (x.to(torch.int32) for x in (q_starts, k_starts))
    with torch.cuda.device_of(q):  # Triton launches on the current GPU
        found = module.attention_packed(*given, *starts, *tensors, work=work)
    o, sums = found if lse else (found, None)
    o = o.to(q.dtype) if emulated else o
    return o if sums is None else (o, sums[0])


def check_packed(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor) -> None:
    """Raise InputMismatch where tensors are no packed batch, or do not fit the spec. The values of the starts are not looked at."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise InputMismatch(f"{name} has {x.ndim} dimensions", where=str(tuple(x.shape)), next_move="Give [rows, H, D].")
    check_shapes(spec, *(x.transpose(0, 1)[None] for x in (q, k, v)))
    for name, x in (("q_starts", q_starts), ("k_starts", k_starts)):
        if x.ndim != 1 or len(x) < 2 or x.dtype not in (torch.int32, torch.int64) or len(x) != len(q_starts):
            shape = f"{name} {list(x.shape)} of {str(x.dtype).removeprefix('torch.')}"
            raise InputMismatch(
                "starts are no list of batch + 1 numbers", where=shape, next_move="Give two int32 tensors [B + 1]."
            )
    if len(k) == 0:
        raise InputMismatch("there are no keys", where=f"k {list(k.shape)}", next_move="Give at least one.")
