"""Operands in eight bits, for prefill.py: kernels that make codes and scales of q, k and v before it runs.

    q, k [B, H, L, D]     ->   int8 [B, H, L', D'], and for each row the scale of its group, float32 [B, H, L']
    v    [B, G, K, E]     ->   fp8  [B, G, E', K'], channels first, as products of eight bits want them, and a scale for each channel

    code = round((x - mean) / scale)        scale = max|x - mean| / 127 of the rows of one group, / 448 of a channel

L' is a multiple of CODED_ROWS, D' and E' are the widths of the product; what was added is zero, so that blocks are read whole. In
the scales of queries stands the factor of the spec, and where no other term follows also log2(e). A program makes CODED_ROWS rows, in
which every group lies whole. Source: "SageAttention2".
"""

import torch
import triton
import triton.language as tl

from attnopt.codegen.triton.kernels.prefill_codes import fp8, padded
from attnopt.codegen.triton.kernels.prefill_holes import (
    CODED_ROWS, D, D_CODES, D_MAIN, D_REST, E, EMULATED, E_CODES, E_MAIN, E_REST, FP8_VALUES, KEY_MEAN, MEAN_BLOCKS, MEAN_KEYS,
    MEAN_PRECISION, QUERY_FACTOR, QUERY_MEANS, SCORE_SCALE, SHIFTED_SCORES, SHIFTED_TOP, VALUE_MEAN, key_group, query_group,
)  # fmt: skip


@triton.jit
def nearest(x):
    """The nearest whole number, halves to even; |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def load_rows(p_x, length, s_row, ROWS: tl.constexpr):
    """The rows of this program of a head, float32 [ROWS, D_CODES]: zero past the end."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, D_CODES)
    m_x = (o_row < length)[:, None] & (o_d < D)[None, :]
    return tl.cast(tl.load(p_x + tl.cast(o_row, tl.int64)[:, None] * s_row + o_d[None, :], mask=m_x, other=0.0), tl.float32)


@triton.jit
def less(b_x, b_mean, length, ROWS: tl.constexpr):
    """Rows less a mean [D_CODES], zero past the end."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return tl.where((o_row < length)[:, None], b_x - b_mean[None, :], 0.0)


@triton.jit
def load_mean(p_mean):
    """Of the keys of a head: [D_CODES]."""
    o_d = tl.arange(0, D_CODES)
    return tl.load(p_mean + o_d, mask=o_d < D, other=0.0)


@triton.jit
def store_codes(b_x, group, factor, p_codes, p_scales, i_head, length):
    """Integers, and for each row the scale of its group times a factor."""
    o_row = tl.program_id(0) * CODED_ROWS + tl.arange(0, CODED_ROWS)
    o_d = tl.arange(0, D_CODES)
    b_peak = tl.max(tl.abs(b_x), 1)
    same = group[:, None] == group[None, :]  # [CODED_ROWS, CODED_ROWS]
    b_peak = tl.max(tl.where(same, b_peak[None, :], 0.0), 1)
    b_scale = tl.where(b_peak == 0.0, 1.0, b_peak / 127.0)
    place = tl.cast(i_head, tl.int64) * padded(length) + o_row
    tl.store(p_scales + place, b_scale * factor)
    b_codes = tl.cast(nearest(b_x / b_scale[:, None]), tl.int8)
    width = D_MAIN + D_REST
    tl.store(p_codes + place[:, None] * width + o_d[None, :], b_codes, mask=(o_d < width)[None, :])


@triton.jit
def code_queries(p_q, p_k_means, p_codes, p_scales, p_shifts, p_q_means, length, heads, key_heads, s_qb, s_qh, s_qm):
    """A program takes CODED_ROWS rows of one head. Less the mean of a block, and beside it q times the mean of the keys."""
    i_b = tl.cast(tl.program_id(1) // heads, tl.int64)
    i_h = tl.cast(tl.program_id(1) % heads, tl.int64)
    o_row = tl.program_id(0) * CODED_ROWS + tl.arange(0, CODED_ROWS)
    o_d = tl.arange(0, D_CODES)
    b_q = load_rows(p_q + i_b * s_qb + i_h * s_qh, length, s_qm, CODED_ROWS)
    if SHIFTED_SCORES or SHIFTED_TOP:
        b_mean = load_mean(p_k_means + (i_b * key_heads + i_h * key_heads // heads) * D)
        b_shift = tl.sum(b_q * b_mean[None, :], 1) * SCORE_SCALE
        tl.store(p_shifts + tl.program_id(1) * padded(length) + o_row, b_shift)
    if QUERY_MEANS:
        count = tl.minimum(length - tl.program_id(0) * CODED_ROWS, CODED_ROWS)
        b_mean = tl.sum(b_q, 0) / count
        p_mean = p_q_means + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * D_CODES
        tl.store(p_mean + o_d, b_mean)
        b_q = less(b_q, b_mean, length, CODED_ROWS)
    store_codes(b_q, query_group(o_row), QUERY_FACTOR, p_codes, p_scales, tl.program_id(1), length)


@triton.jit
def code_keys(p_k, p_k_means, p_codes, p_scales, length, key_heads, s_kb, s_kh, s_kn):
    """A program takes CODED_ROWS keys of one head, less the mean of all."""
    i_b = tl.cast(tl.program_id(1) // key_heads, tl.int64)
    i_h = tl.cast(tl.program_id(1) % key_heads, tl.int64)
    o_row = tl.program_id(0) * CODED_ROWS + tl.arange(0, CODED_ROWS)
    b_k = load_rows(p_k + i_b * s_kb + i_h * s_kh, length, s_kn, CODED_ROWS)
    if KEY_MEAN:
        b_k = less(b_k, load_mean(p_k_means + tl.program_id(1) * D), length, CODED_ROWS)
    store_codes(b_k, key_group(o_row), 1.0, p_codes, p_scales, tl.program_id(1), length)


@triton.jit
def score_means(p_q_means, p_k, p_k_means, p_deltas, blocks, kv_len, heads, key_heads, s_kb, s_kh, s_kn):
    """Means of MEAN_BLOCKS blocks of queries times MEAN_KEYS keys less their mean: what smoothing took out of the scores."""
    i_b = tl.cast(tl.program_id(1) // heads, tl.int64)
    i_g = tl.program_id(1) % heads * key_heads // heads
    o_block = tl.program_id(2) * MEAN_BLOCKS + tl.arange(0, MEAN_BLOCKS)
    o_n = tl.program_id(0) * MEAN_KEYS + tl.arange(0, MEAN_KEYS)
    o_d = tl.arange(0, D_CODES)
    b_k = load_rows(p_k + i_b * s_kb + i_g * s_kh, kv_len, s_kn, MEAN_KEYS)
    if KEY_MEAN:
        b_k = less(b_k, load_mean(p_k_means + (i_b * key_heads + i_g) * D), kv_len, MEAN_KEYS)
    p_mean = p_q_means + (tl.program_id(1) * blocks + o_block)[:, None] * D_CODES + o_d[None, :]
    b_mean = tl.load(p_mean, mask=(o_block < blocks)[:, None], other=0.0)  # [MEAN_BLOCKS, D_CODES]
    b_s = tl.dot(b_mean, tl.trans(b_k), input_precision=MEAN_PRECISION) * SCORE_SCALE
    p_delta = p_deltas + (tl.cast(tl.program_id(1), tl.int64) * blocks + o_block)[:, None] * padded(kv_len) + o_n[None, :]
    tl.store(p_delta, b_s, mask=(o_block < blocks)[:, None])


@triton.jit
def code_values(p_v, p_v_scales, p_v_means, p_codes, length, heads, s_vb, s_vh, s_vn):
    """A program takes CODED_ROWS rows of one head and writes them channels first, less the mean of each channel."""
    i_b = tl.cast(tl.program_id(1) // heads, tl.int64)
    i_h = tl.cast(tl.program_id(1) % heads, tl.int64)
    o_row = tl.program_id(0) * CODED_ROWS + tl.arange(0, CODED_ROWS)
    o_e = tl.arange(0, E_CODES)
    m_v = (o_row < length)[:, None] & (o_e < E)[None, :]
    place = tl.cast(tl.program_id(1), tl.int64) * (E_MAIN + E_REST) + o_e
    m_e = o_e < E_MAIN + E_REST
    p_rows = p_v + i_b * s_vb + i_h * s_vh + tl.cast(o_row, tl.int64)[:, None] * s_vn
    b_v = tl.cast(tl.load(p_rows + o_e[None, :], mask=m_v, other=0.0), tl.float32)
    if VALUE_MEAN:
        b_v = b_v - tl.load(p_v_means + place, mask=m_e, other=0.0)[None, :]
    b_v = tl.where(m_v, b_v / tl.load(p_v_scales + place, mask=m_e, other=1.0)[None, :], 0.0)
    p_out = p_codes + place[:, None] * padded(length) + o_row[None, :]
    tl.store(p_out, tl.trans(fp8(b_v)), mask=m_e[:, None])


def whole_rows(length):
    """Rows of codes for so many rows."""
    return triton.cdiv(length, CODED_ROWS.value) * CODED_ROWS.value


def smooth(k):
    """k [B, G, K, D] -> the mean of each head, float32 [B, G, D], where it is taken out."""
    if KEY_MEAN:
        return k.mean(2, dtype=torch.float32)
    else:
        return None


def coded_queries(q, k_means, key_heads):
    """q [B, H, Q, D] -> codes, scales [B, H, Q'], q times the means of keys [B, H, Q'], means of blocks [B, H, Q' / 128, D']."""
    batch, heads, length, _ = q.shape
    rows = whole_rows(length)
    blocks = rows // CODED_ROWS.value
    codes = torch.empty((batch, heads, rows, D_MAIN.value + D_REST.value), dtype=torch.int8, device=q.device)
    scales = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    if SHIFTED_SCORES or SHIFTED_TOP:
        shifts = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
    else:
        shifts = None
    if QUERY_MEANS:
        means = torch.empty((batch, heads, blocks, D_CODES.value), dtype=torch.float32, device=q.device)
    else:
        means = None
    code_queries[(blocks, batch * heads)](
        q, k_means, codes, scales, shifts, means, length, heads, key_heads, q.stride(0), q.stride(1), q.stride(2),
        num_warps=8,
    )  # fmt: skip
    return codes, scales, shifts, means


def coded_keys(k, k_means):
    """k [B, G, K, D] -> codes, scales [B, G, K']."""
    batch, heads, length, _ = k.shape
    rows = whole_rows(length)
    codes = torch.empty((batch, heads, rows, D_MAIN.value + D_REST.value), dtype=torch.int8, device=k.device)
    scales = torch.empty((batch, heads, rows), dtype=torch.float32, device=k.device)
    code_keys[(rows // CODED_ROWS.value, batch * heads)](
        k, k_means, codes, scales, length, heads, k.stride(0), k.stride(1), k.stride(2), num_warps=8,
    )  # fmt: skip
    return codes, scales


def scored_means(q_means, k, k_means):
    """What each block of queries adds to the scores of all keys: float32 [B, H, Q' / 128, K']."""
    if QUERY_MEANS:
        batch, heads, blocks, _ = q_means.shape
        rows = whole_rows(k.shape[2])
        deltas = torch.empty((batch, heads, blocks, rows), dtype=torch.float32, device=k.device)
        score_means[(rows // MEAN_KEYS.value, batch * heads, triton.cdiv(blocks, MEAN_BLOCKS.value))](
            q_means, k, k_means, deltas, blocks, k.shape[2], heads, k.shape[1], k.stride(0), k.stride(1), k.stride(2),
        )  # fmt: skip
        return deltas
    else:
        return None


def coded_values(v):
    """v [B, G, K, E] -> codes [B, G, E', K'] or v less its mean in half precision, scales and means [B, G, E']."""
    batch, heads, length, width = v.shape
    channels = E_MAIN.value + E_REST.value
    means = torch.zeros((batch, heads, channels), dtype=torch.float32, device=v.device)
    if VALUE_MEAN:
        means[..., :width] = v.mean(2, dtype=torch.float32)
    if FP8_VALUES:
        low, high = torch.aminmax(v, dim=2)
        peak = torch.maximum(high.float() - means[..., :width], means[..., :width] - low.float())
        scales = torch.ones_like(means)
        scales[..., :width] = torch.where(peak == 0, 1.0, peak / 448.0)
        rows = whole_rows(length)
        if EMULATED:
            kind = torch.float32
        else:
            kind = torch.float8_e4m3fn
        codes = torch.empty((batch, heads, channels, rows), dtype=kind, device=v.device)
        code_values[(rows // CODED_ROWS.value, batch * heads)](
            v, scales, means, codes, length, heads, v.stride(0), v.stride(1), v.stride(2),
        )  # fmt: skip
        return codes, scales, means
    else:
        if VALUE_MEAN:
            v = v.float() - means[..., None, :width]
        return v.to(torch.float16), None, means
