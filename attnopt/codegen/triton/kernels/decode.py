"""Attention of a few queries on a long cache: the keys are split among programs, and a second kernel merges what they found.

    o[q] = sum_s w_s o_s[q] / sum_s w_s sum_s[q]        w_s = exp(top_s - top), each split s having its own top_s, sum_s and o_s

    grid      decode: one program for each block of rows of one key head of one sequence, times the number of splits;
              merge: one program for each row of the output
    rows      the query heads that share a key head, for each of their queries: row q * ratio + r is query q of head r. So keys are
              read once for all of them; BLOCK_Q is at least 16, the smallest product of tensor cores, which costs nothing where
              memory is what a step waits for
    a program walks over its share of the blocks that any of its rows sees, as prefill.py does, and leaves b_o, b_top and b_sum
    cache     keys and values may be codes: x = (code + zero) * scale. Scales that a whole token or a group of its channels shares
              are taken out of the product, sum_d q_d code_d * scale + zero * sum_d q_d, so that codes are only converted
    parts     a row is cut into D_PIECES pieces of D_PIECE channels, for its width or its groups; of int4 a part is one half of
              each byte, because byte j holds channels j and D_STORED + j, and of int2 one of its four shares
    pages     a token stands in page pages[sequence, token // PAGE] at token % PAGE
    prefixes  p_ pointer   s_ stride   i_ index of a program or block   o_ offsets   m_ mask   b_ block of data

Tokens past the end read the last one again; the mask of the last block leaves them out.
Sources: "Flash-Decoding for long-context inference"; "FlashAttention-2" (the walk); "KIVI" (scales by channel in groups of tokens).
"""

import math

import torch
import triton
import triton.language as tl

from attnopt.codegen.triton.kernels.cached import (
    BLOCK_Q,
    BLOCK_K,
    D_PIECE,
    D_PIECES,
    D_SHARES,
    D_STORED,
    D_PADDED,
    E_PIECE,
    E_PIECES,
    E_SHARES,
    E_STORED,
    K_STORAGE,
    K_SCALES,
    K_GROUP,
    K_ZEROS,
    K_MIDDLE,
    V_STORAGE,
    V_SCALES,
    V_GROUP,
    V_ZEROS,
    V_MIDDLE,
    V_SHIFTS,
    PAGED,
    PAGE,
    places,
    scores,
    weigh,
)
from attnopt.codegen.triton.kernels.merge import (
    E,
    LOG2E,
    LENGTHS,
    SCORES,
    OFFSET,
    MEAN_OF_EMPTY,
    LSE,
    merge,
    query_offset,
    split_count,
)
from attnopt.codegen.triton.kernels.sight import inner_mask_mod, inner_range, key_range, leading_keys, mask_mod, score_mod

NUM_WARPS = 4
NUM_STAGES = 2
SPAN = 0
D = tl.constexpr(16)
D_WIDTH = tl.constexpr(16)
K_SHIFTS = tl.constexpr(False)
SCALE = tl.constexpr(1.0)
PHASES = tl.constexpr(0)
RANGE = tl.constexpr(False)
MASK = tl.constexpr(False)
INNER_MASK = tl.constexpr(False)
LEADING = tl.constexpr(False)
LEFT_EDGE = tl.constexpr(False)


@triton.jit
def decode(
    p_q, p_k, p_v, p_part, p_stats,
    p_ks, p_kz, p_vs, p_vz, p_pages, p_lengths,
    operands,
    q_len, kv_len, heads, key_heads, value_heads, ratio, splits,
    s_qb, s_qh, s_qm, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn,
    s_ksb, s_ksh, s_ksn, s_vsb, s_vsh, s_vsn, s_pages,
):  # fmt: skip
    dtype: tl.constexpr = p_q.dtype.element_ty
    i_s = tl.program_id(1)
    rows = q_len * ratio
    row_blocks = tl.cdiv(rows, BLOCK_Q)
    groups = heads // ratio
    i_m = tl.program_id(0) % row_blocks
    i_g = tl.cast(tl.program_id(0) // row_blocks % groups, tl.int64)
    i_b = tl.cast(tl.program_id(0) // row_blocks // groups, tl.int64)
    if LENGTHS:
        kv_len = tl.load(p_lengths + i_b)
    i_kh = i_g * ratio * key_heads // heads
    i_vh = i_g * ratio * value_heads // heads
    p_k += i_kh * s_kh
    p_v += i_vh * s_vh

    o_m = i_m * BLOCK_Q + tl.arange(0, BLOCK_Q)  # [BLOCK_Q]
    m_m = o_m < rows
    o_row = tl.minimum(o_m, rows - 1)
    h = (i_g * ratio + o_row % ratio)[:, None]  # [BLOCK_Q, 1]
    row = (o_row // ratio)[:, None]
    q = row
    q_first = i_m * BLOCK_Q // ratio  # the block's queries: first and last
    q_last = (tl.minimum(i_m * BLOCK_Q + BLOCK_Q, rows) - 1) // ratio
    if OFFSET:
        offset = query_offset(q_len, kv_len)
        q += offset
        q_first += offset
        q_last += offset

    # The queries, by parts, and what scales and zero points make of them.
    p_rows = p_q + i_b * s_qb + h * s_qh + tl.cast(row, tl.int64) * s_qm
    b_q = ()
    b_q_sum = ()
    if K_SCALES == "channel":
        # Scales that all tokens share go into the query, relative to the largest of them.
        o_steps = i_b * s_ksb + i_kh * s_ksh
        o_d = tl.arange(0, D_WIDTH)
        b_steps = tl.cast(tl.load(p_ks + o_steps + o_d, mask=o_d < D, other=0.0), tl.float32)
        b_k_peak = tl.maximum(tl.max(b_steps, 0), 1e-30)
    if K_SHIFTS:
        b_q_sums = tl.zeros([BLOCK_Q], tl.float32)
    for P in tl.static_range(0, D_PIECES):
        o_d = tl.arange(0, D_PIECE) + P * D_PIECE
        for SHARE in tl.static_range(0, D_SHARES):
            o_c = o_d + SHARE * D_STORED
            if D_PADDED:
                b_part = tl.load(p_rows + o_c[None, :], mask=o_d[None, :] < D_STORED, other=0.0)  # [BLOCK_Q, D_PIECE]
            else:
                b_part = tl.load(p_rows + o_c[None, :])  # [BLOCK_Q, D_PIECE]
            if K_SCALES == "channel":
                b_step = tl.cast(tl.load(p_ks + o_steps + o_c, mask=o_d < D_STORED, other=0.0), tl.float32) / b_k_peak
                b_part = (tl.cast(b_part, tl.float32) * b_step[None, :]).to(dtype)
                if K_ZEROS:
                    b_zero = tl.cast(tl.load(p_kz + o_steps + o_c, mask=o_d < D_STORED, other=0.0), tl.float32) + K_MIDDLE
                    b_q_sums += tl.sum(tl.cast(b_part, tl.float32) * b_zero[None, :], 1)
            elif K_SHIFTS:
                b_q_sums += tl.sum(tl.cast(b_part, tl.float32), 1)
            elif K_ZEROS:
                b_q_sum = b_q_sum + (tl.sum(tl.cast(b_part, tl.float32), 1),)
            b_q = b_q + (b_part,)

    b_top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    b_o = ()
    b_shift = ()
    for P in tl.static_range(0, E_PIECES):
        for SHARE in tl.static_range(0, E_SHARES):
            b_o = b_o + (tl.zeros([BLOCK_Q, E_PIECE], tl.float32),)
            if V_SHIFTS:
                b_shift = b_shift + (tl.zeros([BLOCK_Q], tl.float32),)

    # Blocks of keys that the rows see: first … inner_first … inner_end … end, and 0 … leading.
    if RANGE:
        first, end = key_range(q_first, q_last, q_len, kv_len)
        first = tl.maximum(first, 0) // BLOCK_K
        end = tl.maximum(tl.cdiv(tl.minimum(end, kv_len), BLOCK_K), first)
    else:
        first = 0
        end = tl.cdiv(kv_len, BLOCK_K)
    if LEADING:
        leading = tl.cdiv(tl.minimum(leading_keys(q_len, kv_len), kv_len), BLOCK_K)
        end = tl.maximum(end, leading)
        leading = tl.minimum(leading, first)
    # They are counted, those that lead first, and this program takes the steps start … stop of them.
    steps = end - first
    if LEADING:
        steps += leading
    share = tl.cdiv(steps, splits)
    start = tl.minimum(i_s * share, steps)
    stop = tl.minimum(start + share, steps)
    if PHASES == 0:
        if RANGE:
            inner_first, inner_end = inner_range(q_first, q_last, q_len, kv_len)
            inner_first = tl.minimum(tl.maximum(tl.cdiv(inner_first, BLOCK_K), first), end)
            inner_end = tl.minimum(tl.maximum(tl.minimum(inner_end, kv_len) // BLOCK_K, inner_first), end)
        else:
            inner_first = 0
            inner_end = kv_len // BLOCK_K
        if LEADING:
            inner_first += leading
            inner_end += leading
        inner_first = tl.minimum(tl.maximum(inner_first - first, start), stop)
        inner_end = tl.minimum(tl.maximum(inner_end - first, inner_first), stop)
        inner = inner_end - inner_first
    for EDGE in tl.static_range(PHASES, 2):
        if EDGE:
            if PHASES == 0:
                count = stop - start - inner
            else:
                count = stop - start
        else:
            count = inner
        for i in range(0, count):
            if EDGE:
                i_n = start + i
                if PHASES == 0:
                    i_n = tl.where(i_n < inner_first, i_n, i_n + inner)
            else:
                i_n = inner_first + i
            if LEADING:
                i_n = tl.where(i_n < leading, i_n, i_n - leading + first)
            elif RANGE:
                i_n += first
            o_n = tl.arange(0, BLOCK_K) + i_n * BLOCK_K  # [BLOCK_K]
            m_k = (o_n < kv_len)[None, :]
            k = o_n[None, :]  # [1, BLOCK_K]
            i_page, o_at = places(i_b, i_n, kv_len, p_pages, s_pages, EDGE)
            if K_SCALES == "block":
                o_ks = i_page * s_ksb + i_kh * s_ksh + o_at // K_GROUP * s_ksn
            elif K_SCALES == "channel":
                o_ks = tl.zeros([BLOCK_K], tl.int32)
            else:
                o_ks = i_page * s_ksb + i_kh * s_ksh + o_at * s_ksn
            b_s = scores(b_q, b_q_sum, p_k, p_ks, p_kz, i_page * s_kb + o_at * s_kn, o_ks, dtype)  # [BLOCK_Q, BLOCK_K]
            if K_SCALES == "token":
                b_step = tl.cast(tl.load(p_ks + o_ks), tl.float32)  # [BLOCK_K]
                if K_ZEROS:
                    b_zero = tl.cast(tl.load(p_kz + o_ks), tl.float32) + K_MIDDLE
                    b_s += b_q_sums[:, None] * b_zero[None, :]
                b_s = b_s * b_step[None, :]
            elif K_SCALES == "channel":
                if K_ZEROS:
                    b_s += b_q_sums[:, None]
                b_s = b_s * b_k_peak
            if SCORES:
                b_s = score_mod(b_s * SCALE, i_b, h, q, row, k, m_k, q_len, kv_len, operands)
            if EDGE:
                if MASK:
                    b_s = tl.where(m_k & mask_mod(i_b, h, q, row, k, m_k, q_len, kv_len, operands), b_s, -float("inf"))
                else:
                    b_s = tl.where(m_k, b_s, -float("inf"))
            elif INNER_MASK:
                b_s = tl.where(inner_mask_mod(i_b, h, q, row, k, m_k, q_len, kv_len, operands), b_s, -float("inf"))

            # Rows that have seen nothing yet: exp2(-inf - 0) is 0, -inf - -inf would be NaN.
            if SCORES:
                b_new = tl.maximum(b_top, tl.max(b_s, 1))  # [BLOCK_Q]
                b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
                # The difference comes first: a bias of the smallest float32 would overflow when it meets log2(e).
                b_p = tl.exp2((b_s - b_safe[:, None]) * LOG2E)
                b_decay = tl.exp2((b_top - b_safe) * LOG2E)
            else:
                # The top is kept as a power of two, so that each score takes one fused multiply-add.
                b_new = tl.maximum(b_top, tl.max(b_s, 1) * (SCALE * LOG2E))  # [BLOCK_Q]
                b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
                b_p = tl.exp2(b_s * (SCALE * LOG2E) - b_safe[:, None])
                b_decay = tl.exp2(b_top - b_safe)
            b_sum = b_sum * b_decay + tl.sum(b_p, 1)
            b_top = b_new
            o_v = i_page * s_vb + o_at * s_vn
            if V_SCALES == "block":
                o_vs = i_page * s_vsb + i_vh * s_vsh + o_at // V_GROUP * s_vsn
            else:
                o_vs = i_page * s_vsb + i_vh * s_vsh + o_at * s_vsn
            if V_SHIFTS:
                b_o, b_shift = weigh(b_p, b_decay, b_o, b_shift, p_v, p_vs, p_vz, o_v, o_vs, dtype)
            else:
                b_o = weigh(b_p, b_decay, b_o, b_shift, p_v, p_vs, p_vz, o_v, o_vs, dtype)

    if MEAN_OF_EMPTY:
        # A row that saw nothing leaves the sum of this program's share of all values instead.
        m_empty = b_sum == 0.0
        if tl.max(tl.cast(m_empty, tl.int32)) > 0:
            share = tl.cdiv(tl.cdiv(kv_len, BLOCK_K), splits)
            for i_n in range(i_s * share, tl.minimum(i_s * share + share, tl.cdiv(kv_len, BLOCK_K))):
                m_k = (tl.arange(0, BLOCK_K) + i_n * BLOCK_K < kv_len)[None, :]
                i_page, o_at = places(i_b, i_n, kv_len, p_pages, s_pages, True)
                o_v = i_page * s_vb + o_at * s_vn
                if V_SCALES == "block":
                    o_vs = i_page * s_vsb + i_vh * s_vsh + o_at // V_GROUP * s_vsn
                else:
                    o_vs = i_page * s_vsb + i_vh * s_vsh + o_at * s_vsn
                b_p = tl.where(m_empty[:, None] & m_k, 1.0, 0.0)
                b_decay = tl.full([BLOCK_Q], 1.0, tl.float32)
                if V_SHIFTS:
                    b_o, b_shift = weigh(b_p, b_decay, b_o, b_shift, p_v, p_vs, p_vz, o_v, o_vs, dtype)
                else:
                    b_o = weigh(b_p, b_decay, b_o, b_shift, p_v, p_vs, p_vz, o_v, o_vs, dtype)

    # What a split found: [batch, heads, q_len, splits, E], and its top and sum.
    o_out = (((i_b * heads)[None, None] + h) * q_len + row) * splits + i_s  # [BLOCK_Q, 1]
    for P in tl.static_range(0, E_PIECES):
        o_e = tl.arange(0, E_PIECE) + P * E_PIECE
        m_e = o_e < E_STORED
        for SHARE in tl.static_range(0, E_SHARES):
            o_c = o_e + SHARE * E_STORED
            b_part = b_o[P * E_SHARES + SHARE]
            if V_SCALES == "channel":
                o_vs = i_b * s_vsb + i_vh * s_vsh + o_c
                if V_ZEROS:
                    b_zero = tl.cast(tl.load(p_vz + o_vs, mask=m_e, other=0.0), tl.float32) + V_MIDDLE
                    b_part += b_shift[P * E_SHARES + SHARE][:, None] * b_zero[None, :]
                b_part = b_part * tl.cast(tl.load(p_vs + o_vs, mask=m_e, other=0.0), tl.float32)[None, :]
            elif V_SHIFTS:
                b_part += b_shift[P * E_SHARES + SHARE][:, None]
            tl.store(p_part + o_out * E + o_c[None, :], b_part, mask=m_m[:, None] & m_e[None, :])
    o_out = tl.reshape(o_out, [BLOCK_Q]) * 2
    tl.store(p_stats + o_out, b_top, mask=m_m)
    tl.store(p_stats + o_out + 1, b_sum, mask=m_m)


def attention(
    q, k, v, tensors=None, k_scales=None, k_zeros=None, v_scales=None, v_zeros=None, pages=None, lengths=None, o=None, splits=0
):  # fmt: skip
    """q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E] -> o [B, H, Q, E], and the log-sum-exp [B, H, Q] where the kernel stores it.

    As codes, int4 has rows of half as many bytes, int2 of a fourth; scales and zeros [B, G, rows, columns].
    In pages, k and v are [P, G, PAGE, …],
    scales too, and pages [B, …] int32 names those of a sequence. lengths [B] int32: the tokens of each sequence. An `o` that is
    given is written to; it must be contiguous. splits: how many programs share the keys, 0 for a good number.
    """
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, q_len, _ = q.shape
    if PAGED:
        kv_len = pages.shape[1] * PAGE.value
    else:
        kv_len = k.shape[2]
    ratio = math.gcd(heads // k.shape[1], heads // v.shape[1])
    programs = batch * (heads // ratio) * triton.cdiv(q_len * ratio, BLOCK_Q.value)
    if o is None:
        o = torch.empty((batch, heads, q_len, E.value), dtype=q.dtype, device=q.device)
    if LSE:
        lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    else:
        lse = None
    if o.numel() > 0:
        if splits == 0:
            processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
            if SPAN:
                blocks = triton.cdiv(min(kv_len, SPAN + q_len), BLOCK_K.value)
            else:
                blocks = triton.cdiv(kv_len, BLOCK_K.value)
            splits = split_count(programs, blocks, processors)
        part = torch.empty((batch, heads, q_len, splits, E.value), dtype=torch.float32, device=q.device)
        stats = torch.empty((batch, heads, q_len, splits, 2), dtype=torch.float32, device=q.device)
        if K_STORAGE == "fp8":
            k = k.view(torch.uint8)
        if V_STORAGE == "fp8":
            v = v.view(torch.uint8)
        decode[(programs, splits)](
            q, k, v, part, stats,
            k_scales, k_zeros, v_scales, v_zeros, pages, lengths,
            tensors,
            q_len, kv_len, heads, k.shape[1], v.shape[1], ratio, splits,
            q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
            k_scales.stride(0), k_scales.stride(1), k_scales.stride(2),
            v_scales.stride(0), v_scales.stride(1), v_scales.stride(2), pages.stride(0),
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
        merge[(batch * heads * q_len,)](
            part, stats, o, lse, lengths,
            tensors,
            q_len, kv_len, heads, splits,
            num_warps=4,
        )  # fmt: skip
    if LSE:
        return o, lse
    else:
        return o
