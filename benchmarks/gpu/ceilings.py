"""What this very GPU can do, measured: the rate of a large bf16 product and the bandwidth of a copy, which shares are taken of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu.clock import in_turn


@dataclass(frozen=True)
class Ceilings:
    """product: FLOP a second. copy: bytes a second, read and written counted."""

    product: float
    copy: float


def ceilings(device: torch.device) -> Ceilings:
    side, length = (8192, 2 << 30) if device.type == "cuda" else (64, 1 << 16)
    a, b = (torch.randn((side, side), device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.ones(length, dtype=torch.int8, device=device)
    target, product = torch.empty_like(source), torch.empty_like(a)
    calls = {"product": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)}
    for call in calls.values():
        call()
    seconds = in_turn(calls)
    return Ceilings(2 * side**3 / seconds["product"], 2 * length / seconds["copy"])
