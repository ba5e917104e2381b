"""Operators of torch whose kernels are made when they first run: what torch must know of them to load a graph, and no more.

    import attnopt; torch.export.load("fast.pt2")   ->   torch.ops.attnopt.triton_attention is known; no compiler is imported

attnopt::triton_attention(q, k, v, operands, spec) computes a spec by the kernel that is emitted for it: on a GPU, or in Triton's
interpreter. On CPU tensors outside of the interpreter it computes the spec's meaning in plain PyTorch, exact and slow, so that a
model that was made for a GPU can be checked, saved and tried where there is none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnopt.errors import InputMismatch


@torch.library.custom_op("attnopt::triton_attention", mutates_args=())
def triton_attention(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    """q [B, H, Q, D], k [B, G, K, D], v [B, G', K, E] -> o [B, H, Q, E]; operands in the order of the spec's. Inference only."""
    from attnopt.codegen.triton.triton_attention import read, run_triton

    made: Tensor = run_triton(q, k, v, operands, read(spec))
    return made


@triton_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.custom_op("attnopt::triton_attention_lse", mutates_args=())
def triton_attention_lse(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of each row, float32 [B, H, Q]."""
    from attnopt.codegen.triton.triton_attention import read, run_triton

    o, lse = run_triton(q, k, v, operands, read(spec), lse=True)
    return o, lse


@triton_attention_lse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], spec: str) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)


def refuse_gradients(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """torch calls it where an input asks for a gradient: better now than in a backward pass that is not there."""
    raise InputMismatch(
        "Triton kernels of attnopt have no gradient", where=inputs[-1], next_move="Call them under torch.no_grad()."
    )


for operator in (triton_attention, triton_attention_lse):
    operator.register_autograd(lambda ctx, *gradients: None, setup_context=refuse_gradients)
