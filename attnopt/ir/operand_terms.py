"""What a spec does to q, k and v before their product: row normalisation, rotary position, rounding to a storage type."""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.ir.clause import Clause


def normalize_rows(x: Tensor, clause: Clause, gain: Tensor | None) -> Tensor:
    """`norm(rms|l2|layer, eps)`: x [B, H, L, D] along D, times the gain [D] where one is given.

    Source: "Query-Key Normalization for Transformers"; RMSNorm in Qwen3 and Gemma-3.
    """
    kind, eps = clause.args[0], float(clause.get("eps"))  # type: ignore[arg-type]
    if kind == "l2":
        result = x / x.norm(dim=-1, keepdim=True).clamp(min=eps)
    elif kind == "rms":
        result = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    else:
        result = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    return result if gain is None else result * gain


def rotate(x: Tensor, clause: Clause, positions: Tensor) -> Tensor:
    """`rotary(dims, base, pairs)`: rotate the first `dims` channels of x [B, H, L, D] by position * base^(-2i/dims).

    pairs=half couples channel i with i + dims/2, pairs=interleaved couples 2i with 2i + 1. Source: "RoFormer".
    """
    dims = int(clause.args[0])  # type: ignore[arg-type]
    base = float(clause.get("base"))  # type: ignore[arg-type]
    frequency = base ** (-torch.arange(0, dims, 2, device=x.device, dtype=torch.float64) / dims)
    angle = positions.to(torch.float64)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    head, rest = x[..., :dims], x[..., dims:]
    if clause.get("pairs") == "half":
        first, second = head[..., : dims // 2], head[..., dims // 2 :]
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    else:
        first, second = head[..., 0::2], head[..., 1::2]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    return torch.cat([turned, rest], -1)


INTEGER_LEVELS = {"int8": 127, "int4": 7, "int2": 1}
FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp32": torch.float32}


def round_to(x: Tensor, clause: Clause, operand: str | None) -> Tensor:
    """Round x [B, H, L, D] to the storage type that `precision(q=…)` or `cache(type)` names, and widen it back.

    Integers are symmetric with one scale per row (per token), or per block of rows with block=n; fp8 is E4M3, scaled to 448.
    """
    storage = str(clause.get(operand) if operand else clause.args[0])
    if storage in ("fp16", "bf16") or (storage == "fp32" and x.dtype != torch.float64):
        return x.to(FLOATS[storage]).to(x.dtype)
    if storage == "fp32":
        return x
    peak = x.abs().amax(-1, keepdim=True)
    block = int(clause.get("block")) if operand else 0  # type: ignore[arg-type]
    if block > 1:
        pad = -x.shape[-2] % block
        grouped = torch.nn.functional.pad(peak, (0, 0, 0, pad)).unflatten(-2, (-1, block)).amax(-2, keepdim=True)
        peak = grouped.expand(*grouped.shape[:-2], block, 1).flatten(-3, -2)[..., : x.shape[-2], :]
    levels = INTEGER_LEVELS.get(storage, 448)
    scale = torch.where(peak == 0, torch.ones_like(peak), peak / levels)
    scaled = x / scale
    rounded = scaled.to(FLOATS["fp8"]).to(x.dtype) if storage == "fp8" else scaled.round().clamp(-levels, levels)
    return rounded * scale
