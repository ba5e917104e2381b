"""The two products of attention with rounded operands: what `precision(…)` means, step by step as a low-bit kernel computes it.

    s = q k'    ->    round(q - q̄) round(k - k̄)' + q̄ (k - k̄)' + q k̄'          means of groups of rows, which return exactly
    o = p v     ->    round(p) round(v - v̄) + p v̄                              v per token or per channel

Rows of q (or k) of equal `q_group` (`k_group`) share a scale. A weight is rounded relative to the largest of its row; with `block=n`
to the largest so far, as an online softmax over blocks of n keys knows it. `sum` is the type in which tensor cores add up one block:
the sum is rounded after every 32 keys, blocks are added exactly. fp8 V is scaled to 448, or to 2.25 where fp16 must hold the sum.

    per block           q_group=row // 128, k_group=k // 64
    per warp            q_group=row // 32
    per thread          q_group=row // 32 * 8 + row % 8, k_group=k // 64 * 4 + k % 8 // 2
    SageAttention2      precision(q=int4, k=int4, p=fp8, v=fp8, …per thread…, v_axis=channel, q_smooth=row // 128, k_smooth=0,
                        block=64, sum=fp22)

Source: "SageAttention2". Of hardware that adds in FP22 it says no more than that: here a sum keeps 13 bits after the first and is
rounded to nearest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ir.clause import Clause
from attnopt.ir.expr import Expr
from attnopt.ir.rows import Call
from attnopt.ir.storage import FLOATS, FP8_MAX, fp8, group_reduce, largest_code, safe, symmetric

STEP = 32  # keys of one instruction of 8-bit tensor cores
FP22_BITS = 14  # of a mantissa, its leading one counted
HALF_SUM_PEAK = 2.25  # 448 * 2.25 * 64 keys is below the largest fp16


def rounded_scores(call: Call, q: Tensor, k: Tensor, clause: Clause) -> Tensor:
    """q k' with both rounded; group means taken out before (`q_smooth`, `k_smooth`) return exactly.

    q k' = (q - mean q) (k - mean k)' + mean q (k - mean k)' + q mean k', of which only the first product is rounded.
    """
    q_mean, k_mean = (smooth_mean(call, x, clause, name) for x, name in ((q, "q"), (k, "k")))
    small_q, small_k = q - q_mean, k - k_mean
    product = round_operand(call, small_q, clause, "q") @ round_operand(call, small_k, clause, "k").transpose(-1, -2)
    return product + q_mean @ small_k.transpose(-1, -2) + q @ k_mean.transpose(-1, -2)


def round_operand(call: Call, x: Tensor, clause: Clause, name: str) -> Tensor:
    """q or k [B, H, L, D] as `precision(q=…, q_group=…)` stores it: rows of equal group share a scale."""
    storage = clause.word(name)
    if storage in FLOATS:
        return symmetric(x, storage, x)
    groups = row_groups(call, clause.expr(f"{name}_group"), name)
    return symmetric(x, storage, group_reduce(x.abs().amax(-1, keepdim=True), groups, "amax"))


def row_groups(call: Call, expr: Expr, name: str) -> Tensor:
    """A group number per row of q or k, [L]."""
    row = call.value(expr, "q" if name == "q" else "k").flatten()
    return row.expand(call.grid.q_len if name == "q" else call.grid.kv_len)


def smooth_mean(call: Call, x: Tensor, clause: Clause, name: str) -> Tensor:
    expr = clause.expr_or_none(f"{name}_smooth")
    return torch.zeros_like(x) if expr is None else group_reduce(x, row_groups(call, expr, name), "mean")


def weighted_values(call: Call, weights: Tensor, v: Tensor, clause: Clause) -> Tensor:
    """P v [B, H, Q, E] with both rounded; the means of v return with the weights as they are."""
    mean = smooth_mean(call, v, clause, "v")
    p, p_scale = weight_codes(weights, clause)
    codes, scale = value_codes(v - mean, clause)
    if clause.word("sum") == "fp32":
        product = (p * p_scale) @ (codes * scale)
    elif clause.word("v_axis") == "token":  # the scale of a token cannot leave the sum over tokens
        product = summed(p, p_scale, codes * scale, clause)
    else:
        product = summed(p, p_scale, codes, clause) * scale
    return product + weights @ mean


def weight_codes(weights: Tensor, clause: Clause) -> tuple[Tensor, Tensor]:
    """The weights [B, H, Q, K] in their type, and what a code stands for: [B, H, Q, K], equal within a row and block."""
    storage = clause.word("p")
    peak = safe(largest_so_far(weights.abs(), clause.count("block")))
    if storage in FLOATS:  # rounded as parts of the largest: the exponential, before anything is divided by its sum
        return (weights, torch.ones_like(weights)) if storage == "fp32" else (symmetric(weights / peak, storage, peak), peak)
    scale = peak / largest_code(storage)
    return coded(weights / scale, storage), scale


def value_codes(v: Tensor, clause: Clause) -> tuple[Tensor, Tensor]:
    """v [B, H, K, E] in its type, and the scale of each token [B, H, K, 1] or channel [B, H, 1, E]."""
    storage = clause.word("v")
    if storage in FLOATS:
        return symmetric(v, storage, v), v.new_ones(())
    top = HALF_SUM_PEAK if storage == "fp8" and clause.word("sum") == "fp16" else largest_code(storage)
    scale = safe(v.abs().amax(-1 if clause.word("v_axis") == "token" else -2, keepdim=True) / top)
    return coded(v / scale, storage), scale


def coded(x: Tensor, storage: str) -> Tensor:
    """Numbers in units of their scale as the type holds them."""
    top = largest_code(storage)
    return fp8(x.clamp(-FP8_MAX, FP8_MAX)) if storage == "fp8" else x.round().clamp(-top, top)


def largest_so_far(weights: Tensor, block: int) -> Tensor:
    """The largest weight of a row up to the end of each one's block of keys, [B, H, Q, K]; of the whole row where block is 0."""
    if not block:
        return weights.amax(-1, keepdim=True).expand_as(weights)
    width = weights.shape[-1]
    peaks = F.pad(weights, (0, -width % block)).unflatten(-1, (-1, block)).amax(-1).cummax(-1).values
    return peaks.repeat_interleave(block, -1)[..., :width]


def summed(p: Tensor, p_scale: Tensor, v: Tensor, clause: Clause) -> Tensor:
    """sum over blocks of scale * (p v), each p v added up in the type that `sum` names, 32 keys at a time."""
    keys, block = p.shape[-1], clause.count("block") or p.shape[-1]
    total = p.new_zeros((*p.shape[:-1], v.shape[-1]))
    for first in range(0, keys, block):
        partial = torch.zeros_like(total)
        for start in range(first, min(first + block, keys), STEP):
            step = slice(start, min(start + STEP, first + block, keys))
            partial = held(partial + p[..., step] @ v[..., step, :], clause.word("sum"))
        total = total + partial * p_scale[..., first, None]
    return total


def held(x: Tensor, kind: str) -> Tensor:
    """A sum as its register holds it: fp22 has the range of fp32 and 13 bits of mantissa."""
    if kind == "fp16":
        return x.half().to(x.dtype)
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**FP22_BITS).round() / 2**FP22_BITS, exponent)
