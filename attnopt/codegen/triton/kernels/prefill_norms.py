"""Queries and keys of norm one, for prefill.py: the query is multiplied by all that belongs to channels, the score by what is left.

    rms(q) * q_gain . rms(k) * k_gain   ->   inverse_norm(k) * ((q * inverse_norm(q) * q_gain * k_gain) . k)

So keys go to the product as they stand in memory. Their norms are computed once, before, by a kernel that reads each key once.
"""

import triton
import triton.language as tl

from attnopt.codegen.triton.kernels.prefill_blocks import load_d
from attnopt.codegen.triton.kernels.prefill_holes import CENTERED, D, D_MAIN, D_PADDED, EPS, NORM

NORM_ROWS = tl.constexpr(64)


@triton.jit
def centred(b_x, o_d):
    """Rows without their means."""
    b_x = b_x - (tl.sum(b_x, 1) / D)[:, None]
    if D_PADDED:
        b_x = tl.where((o_d < D)[None, :], b_x, 0.0)
    return b_x


@triton.jit
def inverse_norm(b_x):
    """What makes the norm of a row 1: its root mean square, or its length."""
    b_square = tl.sum(b_x * b_x, 1)
    if NORM == "rms":
        return tl.rsqrt(b_square / D + EPS)
    else:
        return 1.0 / tl.maximum(tl.sqrt(b_square), EPS)


@triton.jit
def key_norms(p_k, p_norms, kv_len, key_heads, s_kb, s_kh, s_kn):
    """A program takes NORM_ROWS keys of one head; norms are [batch, kv_len, key_heads]."""
    i_b = tl.cast(tl.program_id(1) // key_heads, tl.int64)
    i_h = tl.cast(tl.program_id(1) % key_heads, tl.int64)
    o_n = tl.program_id(0) * NORM_ROWS + tl.arange(0, NORM_ROWS)
    o_d = tl.arange(0, D_MAIN)
    row = tl.cast(tl.minimum(o_n, kv_len - 1), tl.int64)[:, None]
    b_k = tl.cast(load_d(p_k + i_b * s_kb + i_h * s_kh + row * s_kn, o_d[None, :]), tl.float32)  # [NORM_ROWS, D_MAIN]
    if CENTERED:
        b_k = centred(b_k, o_d)
    tl.store(p_norms + (i_b * kv_len + o_n) * key_heads + i_h, inverse_norm(b_k), mask=o_n < kv_len)
