"""The eager twin of prefill_coding.py and prefill_codes.py: operands in eight bits, in plain PyTorch.

    coded_rows(k - mean, k // 64)   ->   integers [B, G, K, D], and for each row the scale of its group [B, G, K]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.codegen.triton.low_precision import AS_IT_IS, CODED_ROWS, scores, smoothed, values
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.spec import AttentionSpec

TOP, LARGEST = 127, 448.0


def coded_rows(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, H, L, D], a group number per row [L] -> integers as reals [B, H, L, D], scales [B, H, L]."""
    peak = x.abs().amax(-1)
    same = groups[:, None] == groups[None]
    peak = torch.where(same, peak[..., None, :], 0.0).amax(-1)
    scales = torch.where(peak == 0, 1.0, peak / TOP)
    return (x / scales[..., None]).round(), scales


def coded_values(v: Tensor) -> tuple[Tensor, Tensor]:
    """v [B, G, K, E] -> codes of E4M3 as reals, a scale per channel [B, G, E]."""
    peak = v.abs().amax(2)
    scales = torch.where(peak == 0, 1.0, peak / LARGEST)
    return fp8(v / scales[:, :, None]), scales


def fp8(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(x.dtype)


def means_of_blocks(q: Tensor) -> Tensor:
    """For each row of q [B, H, Q, D] the mean of its CODED_ROWS."""
    return torch.cat([part.mean(2, keepdim=True).expand_as(part) for part in q.split(CODED_ROWS, 2)], 2)


@dataclass(frozen=True)
class Operands:
    """What the products read: q and k as codes times scales (or as they came), what smoothing took out of both, v, its mean."""

    spec: AttentionSpec
    q: Tensor
    k: Tensor
    v: Tensor
    q_whole: Tensor
    k_smooth: Tensor
    q_mean: Tensor
    k_mean: Tensor
    v_mean: Tensor

    def products(self, rows: Tensor, columns: Tensor) -> Tensor:
        """q k' [B, H, rows, columns]: of the integers, and what returns of the means in full."""
        found = self.q[:, :, rows] @ self.k[:, :, columns].mT
        if smoothed(self.spec, "q"):
            found = found + self.q_mean[:, :, rows] @ self.k_smooth[:, :, columns].mT
        return found + self.q_whole[:, :, rows] @ self.k_mean.mT if smoothed(self.spec, "k") else found

    def weighed(self, p: Tensor, columns: Tensor) -> Tensor:
        """p v for weights of at most 1."""
        kind = values(self.spec)
        if kind != AS_IT_IS:
            p = fp8(p * LARGEST) / LARGEST if kind == "fp8" else p.half().to(p.dtype)
        return p @ self.v[:, :, columns]


def operands(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Operands:
    """q, k and v [B, H, L, …] with a key head for every query head."""

    def groups(side: str, length: int) -> Tensor:
        assert spec.precision is not None
        row = evaluate(spec.precision.expr(f"{side}_group"), Grid(1, 1, length, length)).flatten()
        return row.expand(length)

    nothing = q.new_zeros(())
    k_mean = k.mean(2, keepdim=True) if smoothed(spec, "k") else nothing
    q_mean = means_of_blocks(q) if smoothed(spec, "q") else nothing
    v_mean = v.mean(2, keepdim=True) if smoothed(spec, "v") else nothing
    small_q, small_k, small_v = q - q_mean, k - k_mean, v - v_mean
    if scores(spec):
        (q_codes, q_scales), (k_codes, k_scales) = (
            coded_rows(x, groups(side, x.shape[2])) for side, x in (("q", small_q), ("k", small_k))
        )
        rounded_q, rounded_k = q_codes * q_scales[..., None], k_codes * k_scales[..., None]
    else:
        rounded_q, rounded_k = small_q, small_k
    if values(spec) == "fp8":
        codes, scales = coded_values(small_v)
        small_v = codes * scales[:, :, None]
    elif values(spec) == "fp16":
        small_v = small_v.half().to(v.dtype)
    return Operands(spec, rounded_q, rounded_k, small_v, q, small_k, q_mean, k_mean, v_mean)
