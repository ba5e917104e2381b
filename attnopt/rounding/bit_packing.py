"""Codes of any width from 1 to 8 bits in bytes, and back.

    codes [..., n] of b bits   ->   bytes [..., ceil(n * b / 8)]         4 bits:  3 11 0 7  ->  0xb3 0x70

Bits lie in order, the lowest of each code first: code i takes bits i * b … i * b + b - 1 of its row. For 2, 4 and 8 bits this is the
layout of onnxruntime's MatMulNBits, the first code in the low bits of a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 [..., n], all below 2^bits -> uint8 [..., ceil(n * bits / 8)]; what is left of the last byte is 0."""
    shifts = torch.arange(bits, dtype=torch.uint8)
    ones = (codes[..., None] >> shifts & 1).flatten(-2)
    ones = torch.nn.functional.pad(ones, (0, -ones.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (ones << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpacked(data: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row, uint8 [..., count]."""
    ones = (data[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)
    held = ones[..., : count * bits].unflatten(-1, (count, bits))
    return (held << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
