"""Codes of eight bits in the products of prefill.py: how they are read, and what weights and outputs become.

    int8 scores     s = (code of q) (code of k)' * scale of q's row * scale of k's row
    fp8 values      o = fp8(448 p) (code of v) * scale of v's channel / 448 + how much of the weight is that of keys * mean of v

prefill_coding.py makes the codes. Source: "SageAttention2".
"""

import triton
import triton.language as tl

from attnopt.codegen.triton.kernels.prefill_blocks import load_block
from attnopt.codegen.triton.kernels.prefill_holes import (
    BLOCK_K, CODED_ROWS, DESCRIPTORS, EMULATED, FP8_VALUES, VALUE_MEAN,
)  # fmt: skip


@triton.jit
def padded(length):
    """Rows of codes for so many rows."""
    return (length + CODED_ROWS - 1) // CODED_ROWS * CODED_ROWS


@triton.jit
def fp8(x):
    """E4M3, or the same numbers as float32 where nothing can multiply it."""
    if EMULATED:
        bits = tl.cast(x, tl.int32, bitcast=True)
        bits = (bits + 524287 + ((bits >> 20) & 1)) & -1048576  # three bits of mantissa are left, halves to even
        fine = (x + 24576.0) - 24576.0  # below 2^-6 steps are 2^-9
        x = tl.where(tl.abs(x) < 0.015625, fine, tl.cast(bits, tl.float32, bitcast=True))
        return tl.minimum(tl.maximum(x, -448.0), 448.0)
    else:
        return x.to(tl.float8e4nv)


@triton.jit
def load_channels(p_v, d_v, s_ve, i_b, i_h, i_n, channel, WIDTH: tl.constexpr):
    """Codes of a block of keys, from a channel on: [BLOCK_K, WIDTH]."""
    if DESCRIPTORS:
        b_v = load_block(d_v, i_b, i_h, channel, i_n * BLOCK_K, WIDTH, BLOCK_K)
    else:
        o_e = channel + tl.arange(0, WIDTH)
        o_n = i_n * BLOCK_K + tl.arange(0, BLOCK_K)
        b_v = tl.load(p_v + tl.cast(o_e, tl.int64)[:, None] * s_ve + o_n[None, :])
    return tl.trans(b_v)


@triton.jit
def sum_of_codes(p_v, s_ve, kv_len, channel, WIDTH: tl.constexpr):
    """Over all keys: [WIDTH]."""
    b_total = tl.zeros([WIDTH], tl.float32)
    o_e = channel + tl.arange(0, WIDTH)
    for i_n in range(0, tl.cdiv(kv_len, BLOCK_K)):
        o_n = i_n * BLOCK_K + tl.arange(0, BLOCK_K)
        b_v = tl.load(p_v + tl.cast(o_e, tl.int64)[:, None] * s_ve + o_n[None, :])
        b_total += tl.sum(tl.cast(b_v, tl.float32), 1)
    return b_total


@triton.jit
def restored(b_o, b_share, p_v_scales, p_v_means, o_e):
    """The output in the unit of the values; their mean returns with the weight that it had."""
    if FP8_VALUES:
        b_o = b_o * tl.load(p_v_scales + o_e)[None, :]
    if VALUE_MEAN:
        b_o = b_o + b_share[:, None] * tl.load(p_v_means + o_e)[None, :]
    return b_o
