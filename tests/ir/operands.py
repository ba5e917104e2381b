"""Random operands in float64, and the few formulas that several tests of the reference share."""

from __future__ import annotations

import torch

B, H, Q, D, E = 2, 4, 12, 8, 6


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def rand(*shape):
    return torch.rand(*shape, dtype=torch.float64)


def qkv(q_len=Q, kv_len=None, *, heads=H, key_heads=H, value_heads=None, width=D, value_width=E):
    kv_len = q_len if kv_len is None else kv_len
    q, k = randn(B, heads, q_len, width), randn(B, key_heads, kv_len, width)
    return q, k, randn(B, value_heads or key_heads, kv_len, value_width)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def positions(q_len=Q, kv_len=Q, past=0):
    return torch.arange(q_len)[:, None] + past, torch.arange(kv_len)[None]


def turn(x, place, base=10000.0):
    """Rotary position in complex numbers: channel pairs (a, b) as a + ib, times exp(i m theta)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    theta = base ** (-2 * torch.arange(x.shape[-1] // 2, dtype=torch.float64) / x.shape[-1])
    return torch.view_as_real(pairs * torch.polar(torch.ones(1, dtype=torch.float64), place[:, None] * theta)).flatten(-2)


def masked(q, k, v, seen, scale=1.0):
    return (scale * q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ v
