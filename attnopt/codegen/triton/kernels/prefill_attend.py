"""What one program of prefill.py does: a block of queries of one head, from the first key that it sees to the last."""

import triton
import triton.language as tl

from attnopt.codegen.triton.kernels.prefill_blocks import load_block, load_d, load_d_rest, load_e, load_e_rest, sum_of_values, within_range
from attnopt.codegen.triton.kernels.prefill_codes import fp8, load_channels, padded, restored, sum_of_codes
from attnopt.codegen.triton.kernels.prefill_holes import (
    BLOCK_K, BLOCK_Q, CENTERED, CODED_ROWS, DESCRIPTORS, D_MAIN, D_REST, E, EMPTY_ROWS, E_MAIN, E_PADDED, E_REST, FACTORS,
    FP8_VALUES, INNER_MASK, INT8_SCORES, K_NORM, LEADING, LEFT_EDGE, LIFT, LISTED, LIST_KEYS, LIST_ROWS, LOG2E, LONGEST_FIRST,
    LSE, MASK, MEAN_OF_EMPTY, OFFSET, PACKED, PERSISTENT, PHASES, PRECISION, QUERY_MEANS, Q_NORM, RANGE, ROW_FACTORS, SCALE,
    SCORES, SHIFTED_SCORES, SHIFTED_TOP, SINK, SKIP, SKIPS, SPECIALISED, STATIC, STATIC_SCALE, VALUE_MEAN, channel_factor, inner_mask_mod,
    inner_range, key_range, leading_keys, mask_mod, query_offset, score_mod, sink_logit,
)  # fmt: skip
from attnopt.codegen.triton.kernels.prefill_norms import centred, inverse_norm


@triton.jit
def attend(
    i_item,
    p_q, p_k, p_v, p_o, p_lse, d_q, d_q_rest, d_k, d_k_rest, d_v, d_v_rest, p_norms,
    p_q_scales, p_k_scales, p_v_scales, p_v_means, p_shifts, p_deltas,
    operands,
    p_q_starts, p_k_starts, p_work, p_list,
    q_len, kv_len, rows, batch, heads, key_heads, value_heads, section,
    s_qb, s_qh, s_qm, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn,
):  # fmt: skip
    """One block of queries of one head, from the first key that it sees to the last."""
    if PACKED:
        i_m = tl.load(p_work + i_item // heads * 2 + 1)
        i_b = tl.cast(tl.load(p_work + i_item // heads * 2), tl.int64)
        i_h = tl.cast(i_item % heads, tl.int64)
        q_start = tl.load(p_q_starts + i_b)
        k_start = tl.load(p_k_starts + i_b)
        q_len = tl.load(p_q_starts + i_b + 1) - q_start
        kv_len = tl.load(p_k_starts + i_b + 1) - k_start
        p_q += tl.cast(q_start, tl.int64) * s_qm + i_h * s_qh
        p_k += tl.cast(k_start, tl.int64) * s_kn + i_h * key_heads // heads * s_kh
        k_first = tl.cast(k_start, tl.int64)  # the row of the first key
        p_v += tl.cast(k_start, tl.int64) * s_vn + i_h * value_heads // heads * s_vh
    else:
        q_blocks = tl.cdiv(q_len, BLOCK_Q)
        if PERSISTENT:
            # The longest blocks of all heads come first, but only of so many heads as the cache holds keys and values of.
            i_section = i_item // (section * q_blocks)
            i_item -= i_section * section * q_blocks
            width = tl.minimum(section, batch * heads - i_section * section)
            i_bh = i_section * section + i_item % width
            i_m = i_item // width
        else:
            i_bh = i_item // q_blocks
            i_m = i_item % q_blocks
        if LONGEST_FIRST:
            i_m = q_blocks - 1 - i_m  # later rows see more keys: programs that take long start first
        i_b = tl.cast(i_bh // heads, tl.int64)
        i_h = tl.cast(i_bh % heads, tl.int64)
        p_q += i_b * s_qb + i_h * s_qh
        p_k += i_b * s_kb + i_h * key_heads // heads * s_kh
        k_first = i_b * kv_len  # the row of the first key
        p_v += i_b * s_vb + i_h * value_heads // heads * s_vh

    if INT8_SCORES:
        p_k_scales += (i_b * key_heads + i_h * key_heads // heads) * padded(kv_len)

    o_m = i_m * BLOCK_Q + tl.arange(0, BLOCK_Q)  # [BLOCK_Q]
    o_row = tl.minimum(o_m, q_len - 1)
    o_d = tl.arange(0, D_MAIN)
    o_e = tl.arange(0, E_MAIN)
    row = o_row[:, None]  # [BLOCK_Q, 1]
    q = row
    q_first = i_m * BLOCK_Q  # the block's queries: first and last
    q_last = tl.minimum(i_m * BLOCK_Q + BLOCK_Q, q_len) - 1
    if OFFSET:
        offset = query_offset(q_len, kv_len)
        q += offset
        q_first += offset
        q_last += offset
    if DESCRIPTORS:
        if PACKED:
            i_first = 0  # one batch, in which the sequences stand
            q_row = q_start + i_m * BLOCK_Q
            k_row = k_start
        else:
            i_first = i_b
            q_row = i_m * BLOCK_Q
            k_row = 0
        b_q = load_block(d_q, i_first, i_h, q_row, 0, BLOCK_Q, D_MAIN)  # [BLOCK_Q, D_MAIN]
        if D_REST:
            b_q_rest = load_block(d_q_rest, i_first, i_h, q_row, D_MAIN, BLOCK_Q, D_REST)  # [BLOCK_Q, D_REST]
    else:
        p_rows = p_q + tl.cast(row, tl.int64) * s_qm
        b_q = load_d(p_rows, o_d[None, :])  # [BLOCK_Q, D_MAIN]
        if D_REST:
            o_d_rest = D_MAIN + tl.arange(0, D_REST)
            b_q_rest = load_d_rest(p_rows, o_d_rest[None, :])  # [BLOCK_Q, D_REST]
    if FACTORS:
        b_x = tl.cast(b_q, tl.float32)
        if Q_NORM:
            if CENTERED:
                b_x = centred(b_x, o_d)
            b_x *= inverse_norm(b_x)[:, None]
        b_x *= channel_factor(i_h, i_h * key_heads // heads, o_d[None, :], operands)
        if CENTERED and K_NORM:
            b_x = centred(b_x, o_d)  # in the place of the keys: sum_d q_d (k_d - mean k) = sum_d (q_d - mean q) k_d
        b_q = b_x.to(b_q.dtype)

    if INT8_SCORES:
        b_scale = tl.load(p_q_scales + tl.cast(i_bh, tl.int64) * padded(q_len) + o_m)  # [BLOCK_Q]
        if SHIFTED_SCORES or SHIFTED_TOP:
            b_shift = tl.load(p_shifts + tl.cast(i_bh, tl.int64) * padded(q_len) + o_m)
        if QUERY_MEANS:
            i_block = tl.cast(i_bh, tl.int64) * (padded(q_len) // CODED_ROWS) + i_m * BLOCK_Q // CODED_ROWS
            p_deltas += i_block * padded(kv_len)

    if not STATIC:
        b_top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    b_o = tl.zeros([BLOCK_Q, E_MAIN], tl.float32)
    if E_REST:
        o_e_rest = E_MAIN + tl.arange(0, E_REST)
        b_o_rest = tl.zeros([BLOCK_Q, E_REST], tl.float32)

    # Blocks of keys: first … inner_first … inner_end … end, and 0 … leading.
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
    if PHASES == 0:
        if RANGE:
            inner_first, inner_end = inner_range(q_first, q_last, q_len, kv_len)
            inner_first = tl.minimum(tl.maximum(tl.cdiv(inner_first, BLOCK_K), first), end)
            inner_end = tl.minimum(tl.maximum(tl.minimum(inner_end, kv_len) // BLOCK_K, inner_first), end)
        else:
            inner_first = 0
            inner_end = kv_len // BLOCK_K
        if not LISTED:
            edges = end - inner_end
            if LEFT_EDGE:
                edges += inner_first - first
    elif not LISTED:
        inner_end = first
        edges = end - first
    if LEADING:
        edges += leading
    if LISTED:
        i_list = tl.cast(i_bh, tl.int64) * tl.cdiv(q_blocks, LIST_ROWS) + i_m // LIST_ROWS
        p_list += i_list * (1 + tl.cdiv(kv_len, BLOCK_K * LIST_KEYS))
        tiles = tl.load(p_list)
        edges = tiles * LIST_KEYS
        if PHASES == 0:
            before, inside = within_range(p_list + 1, tiles, inner_first, inner_end)
            edges -= inside * LIST_KEYS

    for EDGE in tl.static_range(PHASES, 2):
        if EDGE:
            blocks = edges
        else:
            if LISTED:
                blocks = inside * LIST_KEYS
            else:
                blocks = inner_end - inner_first
        for i in tl.range(0, blocks, warp_specialize=SPECIALISED):
            if LISTED:
                i_step = tl.cast(i, tl.int32)
                i_tile = i_step // LIST_KEYS
                if PHASES == 0:
                    if EDGE:
                        i_tile = tl.where(i_tile < before, i_tile, i_tile + inside)
                    else:
                        i_tile += before
                i_n = tl.load(p_list + 1 + i_tile) * LIST_KEYS + i_step % LIST_KEYS
            else:
                if EDGE:
                    i_n = inner_end + i
                    if LEFT_EDGE:
                        i_n = tl.where(i_n < end, i_n, i_n - end + first)
                    if LEADING:
                        i_n = tl.where(i < edges - leading, i_n, i - edges + leading)
                else:
                    i_n = inner_first + i
            o_n = i_n * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            m_k = (o_n < kv_len)[None, :]
            if K_NORM or not DESCRIPTORS:
                o_j = tl.arange(0, BLOCK_K)
                if EDGE:
                    o_j = tl.minimum(o_j, kv_len - 1 - i_n * BLOCK_K)
            start = tl.cast(i_n, tl.int64) * BLOCK_K
            if not DESCRIPTORS:
                p_kn = p_k + start * s_kn + o_j[None, :] * s_kn
            if DESCRIPTORS:
                b_k = tl.trans(load_block(d_k, i_first, i_h * key_heads // heads, k_row + i_n * BLOCK_K, 0, BLOCK_K, D_MAIN))
            else:
                b_k = load_d(p_kn, o_d[:, None])  # [D_MAIN, BLOCK_K]
            b_s = tl.dot(b_q, b_k, input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
            if D_REST:
                if DESCRIPTORS:
                    b_k_rest = load_block(
                        d_k_rest, i_first, i_h * key_heads // heads, k_row + i_n * BLOCK_K, D_MAIN, BLOCK_K, D_REST
                    )
                    b_k_rest = tl.trans(b_k_rest)  # [D_REST, BLOCK_K]
                else:
                    b_k_rest = load_d_rest(p_kn, o_d_rest[:, None])  # [D_REST, BLOCK_K]
                if INT8_SCORES:
                    b_s = b_s + tl.dot(b_q_rest, b_k_rest)
                else:
                    b_s = tl.dot(b_q_rest, b_k_rest, b_s, input_precision=PRECISION)
            if K_NORM:
                p_norm = p_norms + (k_first + start) * key_heads + i_h * key_heads // heads
                b_s = b_s * tl.load(p_norm + o_j * key_heads)[None, :]
            if INT8_SCORES:
                b_s = tl.cast(b_s, tl.float32) * tl.load(p_k_scales + o_n)[None, :]
                if not ROW_FACTORS:
                    b_s = b_s * b_scale[:, None]
                if QUERY_MEANS:
                    b_s = b_s + tl.load(p_deltas + o_n)[None, :]
                if SHIFTED_SCORES:
                    b_s = b_s + b_shift[:, None]
            k = o_n[None, :]  # [1, BLOCK_K]
            if SCORES:
                b_s = score_mod(b_s * SCALE, i_b, i_h, q, row, k, m_k, q_len, kv_len, operands)
            if EDGE:
                if MASK:
                    b_s = tl.where(m_k & mask_mod(i_b, i_h, q, row, k, m_k, q_len, kv_len, operands), b_s, -float("inf"))
                else:
                    b_s = tl.where(m_k, b_s, -float("inf"))
            elif INNER_MASK:
                b_s = tl.where(inner_mask_mod(i_b, i_h, q, row, k, m_k, q_len, kv_len, operands), b_s, -float("inf"))

            # Rows that have seen nothing yet: exp2(-inf - 0) is 0, -inf - -inf would be NaN.
            if STATIC:
                # No score is so large that its power leaves float32, nor so small that it is lost: the top is always 0.
                b_p = tl.exp2(b_s * STATIC_SCALE)
                b_sum = b_sum + tl.sum(b_p, 1)
            elif SCORES:
                b_high = tl.max(b_s, 1)  # [BLOCK_Q]
                if FP8_VALUES:
                    b_high -= LIFT / LOG2E
                b_new = tl.maximum(b_top, b_high)
                b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
                # The difference comes first: a bias of the smallest float32 would overflow when it meets log2(e).
                b_p = tl.exp2((b_s - b_safe[:, None]) * LOG2E)
                b_decay = tl.exp2((b_top - b_safe) * LOG2E)
                b_sum = b_sum * b_decay + tl.sum(b_p, 1)
                b_top = b_new
            elif ROW_FACTORS:
                # The factor of a row holds its scale, that of the spec, and log2(e).
                b_high = tl.max(b_s, 1) * b_scale  # [BLOCK_Q]
                if FP8_VALUES:
                    b_high -= LIFT
                b_new = tl.maximum(b_top, b_high)
                b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
                b_p = tl.exp2(b_s * b_scale[:, None] - b_safe[:, None])
                b_decay = tl.exp2(b_top - b_safe)
                b_sum = b_sum * b_decay + tl.sum(b_p, 1)
                b_top = b_new
            else:
                # The top is kept as a power of two, so that each score takes one fused multiply-add.
                b_high = tl.max(b_s, 1) * (SCALE * LOG2E)  # [BLOCK_Q]
                if FP8_VALUES:
                    b_high -= LIFT
                b_new = tl.maximum(b_top, b_high)
                b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
                b_p = tl.exp2(b_s * (SCALE * LOG2E) - b_safe[:, None])
                b_decay = tl.exp2(b_top - b_safe)
                b_sum = b_sum * b_decay + tl.sum(b_p, 1)
                b_top = b_new
            if SKIPS:
                near = tl.max(tl.where(b_high == -float("inf"), -float("inf"), b_high - b_new), 0) > -SKIP
            if not SKIPS or near:
                if FP8_VALUES:
                    # One block is added up in the tensor cores, whose sums are narrow, blocks in float32.
                    b_p = fp8(b_p)
                    b_v = load_channels(p_v, d_v, s_vn, i_b, i_h * value_heads // heads, i_n, 0, E_MAIN)  # [BLOCK_K, E_MAIN]
                    b_o = b_o * b_decay[:, None] + tl.dot(b_p, b_v, max_num_imprecise_acc=BLOCK_K)
                    if E_REST:
                        b_v_rest = load_channels(p_v, d_v_rest, s_vn, i_b, i_h * value_heads // heads, i_n, E_MAIN, E_REST)
                        b_o_rest = b_o_rest * b_decay[:, None] + tl.dot(b_p, b_v_rest, max_num_imprecise_acc=BLOCK_K)
                else:
                    if not DESCRIPTORS:
                        p_vn = p_v + start * s_vn + o_j[:, None] * s_vn
                    if DESCRIPTORS:
                        b_v = load_block(
                            d_v, i_first, i_h * value_heads // heads, k_row + i_n * BLOCK_K, 0, BLOCK_K, E_MAIN
                        )  # [BLOCK_K, E_MAIN]
                        if PACKED:
                            if EDGE:  # what the next sequence holds may be infinite
                                b_v = tl.where((o_n < kv_len)[:, None], b_v, 0.0)
                    else:
                        b_v = load_e(p_vn, o_e[None, :])  # [BLOCK_K, E_MAIN]
                    if E_REST:
                        if DESCRIPTORS:
                            b_v_rest = load_block(
                                d_v_rest, i_first, i_h * value_heads // heads, k_row + i_n * BLOCK_K, E_MAIN, BLOCK_K, E_REST
                            )
                            if PACKED:
                                if EDGE:
                                    b_v_rest = tl.where((o_n < kv_len)[:, None], b_v_rest, 0.0)
                        else:
                            b_v_rest = load_e_rest(p_vn, o_e_rest[None, :])  # [BLOCK_K, E_REST]
                    if not STATIC:
                        b_o = b_o * b_decay[:, None]
                        if E_REST:
                            b_o_rest = b_o_rest * b_decay[:, None]
                    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)  # [BLOCK_Q, E_MAIN]
                    if E_REST:
                        b_o_rest = tl.dot(b_p.to(b_v.dtype), b_v_rest, b_o_rest, input_precision=PRECISION)  # [BLOCK_Q, E_REST]

    if SINK or LSE:
        if STATIC:
            b_top = tl.where(b_sum == 0.0, -float("inf"), 0.0)
        elif not SCORES:
            b_top = b_top / LOG2E
        if SHIFTED_TOP:
            b_top = b_top + b_shift
    if SINK:
        b_sink = tl.reshape(tl.broadcast_to(sink_logit(i_b, i_h, q, row, q_len, kv_len, operands), [BLOCK_Q, 1]), [BLOCK_Q])
        b_new = tl.maximum(b_top, b_sink)
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_decay = tl.exp2((b_top - b_safe) * LOG2E)
        if VALUE_MEAN:
            b_own = b_sum * b_decay
        b_sum = b_sum * b_decay + tl.exp2((b_sink - b_safe) * LOG2E)
        if LSE:
            b_top = b_safe
        b_o = b_o * b_decay[:, None]
        if E_REST:
            b_o_rest = b_o_rest * b_decay[:, None]
    if EMPTY_ROWS:
        m_empty = b_sum == 0.0
        b_share = 1.0 / tl.where(m_empty, 1.0, b_sum)
    else:
        b_share = 1.0 / b_sum
    b_o = b_o * b_share[:, None]
    if E_REST:
        b_o_rest = b_o_rest * b_share[:, None]
    if MEAN_OF_EMPTY:
        if tl.max(tl.cast(m_empty, tl.int32)) > 0:
            if FP8_VALUES:
                b_total = sum_of_codes(p_v, s_vn, kv_len, 0, E_MAIN)
                if E_REST:
                    b_total_rest = sum_of_codes(p_v, s_vn, kv_len, E_MAIN, E_REST)
            else:
                b_total = sum_of_values(p_v, s_vn, kv_len, o_e)
                if E_REST:
                    b_total_rest = sum_of_values(p_v, s_vn, kv_len, o_e_rest)
            if PACKED:
                kv_len = tl.maximum(kv_len, 1)  # a sequence may have none
            b_o = tl.where(m_empty[:, None], (b_total / kv_len)[None, :], b_o)
            if E_REST:
                b_o_rest = tl.where(m_empty[:, None], (b_total_rest / kv_len)[None, :], b_o_rest)

    if FP8_VALUES or VALUE_MEAN:
        p_v_scales += (i_b * value_heads + i_h * value_heads // heads) * (E_MAIN + E_REST)
        p_v_means += (i_b * value_heads + i_h * value_heads // heads) * (E_MAIN + E_REST)
        if VALUE_MEAN:  # it returns with the weight that keys have
            if SINK:
                b_share = b_own * b_share
            elif EMPTY_ROWS and not MEAN_OF_EMPTY:
                b_share = tl.where(m_empty, 0.0, 1.0)
            else:
                b_share = tl.full([BLOCK_Q], 1.0, tl.float32)
        b_o = restored(b_o, b_share, p_v_scales, p_v_means, o_e)
        if E_REST:
            b_o_rest = restored(b_o_rest, b_share, p_v_scales, p_v_means, o_e_rest)

    if PACKED:
        # The output is contiguous: [rows, heads, E], and the log-sum-exp [heads, rows].
        p_rows = p_o + ((tl.cast(q_start, tl.int64) + o_m[:, None]) * heads + i_h) * E
        p_lse += i_h * rows + q_start
    else:
        # The output is contiguous: [batch, heads, q_len, E], and the log-sum-exp [batch, heads, q_len].
        p_rows = p_o + (tl.cast(i_bh, tl.int64) * q_len + o_m[:, None]) * E
        p_lse += tl.cast(i_bh, tl.int64) * q_len
    m_rows = (o_m < q_len)[:, None]
    if E_PADDED and not E_REST:
        tl.store(p_rows + o_e[None, :], b_o, mask=m_rows & (o_e < E)[None, :])
    else:
        tl.store(p_rows + o_e[None, :], b_o, mask=m_rows)
    if E_REST:
        if E_PADDED:
            tl.store(p_rows + o_e_rest[None, :], b_o_rest, mask=m_rows & (o_e_rest < E)[None, :])
        else:
            tl.store(p_rows + o_e_rest[None, :], b_o_rest, mask=m_rows)
    if LSE:
        tl.store(p_lse + o_m, b_top + tl.log(b_sum), mask=o_m < q_len)
