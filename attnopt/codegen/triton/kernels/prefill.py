"""Attention of many queries: softmax over streamed blocks of keys, which are never all in memory.

    o[q] = sum_k exp(s[q, k] - top) v[k] / sum_k exp(s[q, k] - top)         s = score_mod(q k' * SCALE), -inf where hidden

    grid      one program for each block of BLOCK_Q rows of one head: ceil(q_len / BLOCK_Q) * batch * heads
    a program holds its queries, walks over blocks of BLOCK_K keys, and keeps for each row the largest score (b_top), the sum of
              weights (b_sum) and the weighted sum of values (b_o); each grows by exp2(old top - new top) when the top moves
    ranges    key_range says which keys the block of rows can see at all, inner_range which of them every row sees: blocks inside
              need no mask (phase 0), blocks at the edges do (phase 1); what lies outside is not read
    prefixes  p_ pointer   s_ stride   i_ index of a program or block   o_ offsets   m_ mask   b_ block of data
    widths    rows of q and k are D channels, rows of v are E: a power of two (…_MAIN), and a second one (…_REST) for what is left

Positions past the end of queries or keys read the last row again; only the store, and the mask of the last block, leave them out.
Source: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning".
"""

import torch
import triton
import triton.language as tl

BLOCK_Q = tl.constexpr(64)
BLOCK_K = tl.constexpr(32)
NUM_WARPS = 4
NUM_STAGES = 2
SCALE = tl.constexpr(1.0)
LOG2E = tl.constexpr(1.4426950408889634)
D = tl.constexpr(16)
D_MAIN = tl.constexpr(16)
D_REST = tl.constexpr(0)
E = tl.constexpr(16)
E_MAIN = tl.constexpr(16)
E_REST = tl.constexpr(0)
D_PADDED = tl.constexpr(False)
E_PADDED = tl.constexpr(False)
PRECISION = tl.constexpr("ieee")
PHASES = tl.constexpr(0)
RANGE = tl.constexpr(False)
SCORES = tl.constexpr(False)
MASK = tl.constexpr(False)
INNER_MASK = tl.constexpr(False)
LEADING = tl.constexpr(False)
LEFT_EDGE = tl.constexpr(False)
LONGEST_FIRST = tl.constexpr(False)
OFFSET = tl.constexpr(False)
SINK = tl.constexpr(False)
EMPTY_ROWS = tl.constexpr(False)
MEAN_OF_EMPTY = tl.constexpr(False)
LSE = tl.constexpr(False)


@triton.jit
def key_range(q_first, q_last, q_len, kv_len):
    """The first key that any of the queries q_first … q_last sees, and the one after the last."""
    return 0, kv_len


@triton.jit
def inner_range(q_first, q_last, q_len, kv_len):
    """The first of the keys that all of the queries q_first … q_last see, and the one after the last."""
    return 0, kv_len


@triton.jit
def leading_keys(q_len, kv_len):
    """Keys 0 … n - 1 that are visible besides the range."""
    return 0


@triton.jit
def query_offset(q_len, kv_len):
    """The position of the first query."""
    return 0


@triton.jit
def score_mod(score, b, h, q, row, k, m_k, q_len, kv_len, operands):
    """What happens to a score after the first scale; rows stand along the first axis, keys along the second."""
    return score


@triton.jit
def mask_mod(b, h, q, row, k, m_k, q_len, kv_len, operands):
    """Whether a query sees a key."""
    return True


@triton.jit
def inner_mask_mod(b, h, q, row, k, m_k, q_len, kv_len, operands):
    """What of mask_mod is left to be asked inside the range that every row sees."""
    return True


@triton.jit
def sink_logit(b, h, q, row, q_len, kv_len, operands):
    """One more logit of each row, which takes weight and gives nothing."""
    return 0.0


@triton.jit
def prefill(
    p_q, p_k, p_v, p_o, p_lse,
    operands,
    q_len, kv_len, heads, key_heads, value_heads,
    s_qb, s_qh, s_qm, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn,
):  # fmt: skip
    q_blocks = tl.cdiv(q_len, BLOCK_Q)
    i_bh = tl.program_id(0) // q_blocks
    i_m = tl.program_id(0) % q_blocks
    if LONGEST_FIRST:
        i_m = q_blocks - 1 - i_m  # later rows see more keys: programs that take long start first
    i_b = tl.cast(i_bh // heads, tl.int64)
    i_h = tl.cast(i_bh % heads, tl.int64)
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * key_heads // heads * s_kh
    p_v += i_b * s_vb + i_h * value_heads // heads * s_vh

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
    p_rows = p_q + tl.cast(row, tl.int64) * s_qm
    if D_REST:
        o_d_rest = D_MAIN + tl.arange(0, D_REST)
        b_q = tl.load(p_rows + o_d[None, :])  # [BLOCK_Q, D_MAIN]
        if D_PADDED:
            b_q_rest = tl.load(p_rows + o_d_rest[None, :], mask=o_d_rest[None, :] < D, other=0.0)  # [BLOCK_Q, D_REST]
        else:
            b_q_rest = tl.load(p_rows + o_d_rest[None, :])  # [BLOCK_Q, D_REST]
    else:
        if D_PADDED:
            b_q = tl.load(p_rows + o_d[None, :], mask=o_d[None, :] < D, other=0.0)  # [BLOCK_Q, D_MAIN]
        else:
            b_q = tl.load(p_rows + o_d[None, :])  # [BLOCK_Q, D_MAIN]

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
        edges = end - inner_end
        if LEFT_EDGE:
            edges += inner_first - first
    else:
        inner_end = first
        edges = end - first
    if LEADING:
        edges += leading

    for EDGE in tl.static_range(PHASES, 2):
        if EDGE:
            blocks = edges
        else:
            blocks = inner_end - inner_first
        for i in range(0, blocks):
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
            o_j = tl.arange(0, BLOCK_K)
            if EDGE:
                o_j = tl.minimum(o_j, kv_len - 1 - i_n * BLOCK_K)
            start = tl.cast(i_n, tl.int64) * BLOCK_K
            p_kn = p_k + start * s_kn + o_j[None, :] * s_kn
            if D_REST:
                b_k = tl.load(p_kn + o_d[:, None])  # [D_MAIN, BLOCK_K]
                if D_PADDED:
                    b_k_rest = tl.load(p_kn + o_d_rest[:, None], mask=o_d_rest[:, None] < D, other=0.0)  # [D_REST, BLOCK_K]
                else:
                    b_k_rest = tl.load(p_kn + o_d_rest[:, None])  # [D_REST, BLOCK_K]
                b_s = tl.dot(b_q, b_k, input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
                b_s = tl.dot(b_q_rest, b_k_rest, b_s, input_precision=PRECISION)
            else:
                if D_PADDED:
                    b_k = tl.load(p_kn + o_d[:, None], mask=o_d[:, None] < D, other=0.0)  # [D_MAIN, BLOCK_K]
                else:
                    b_k = tl.load(p_kn + o_d[:, None])  # [D_MAIN, BLOCK_K]
                b_s = tl.dot(b_q, b_k, input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
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
            p_vn = p_v + start * s_vn + o_j[:, None] * s_vn
            if E_REST:
                b_v = tl.load(p_vn + o_e[None, :])  # [BLOCK_K, E_MAIN]
                if E_PADDED:
                    b_v_rest = tl.load(p_vn + o_e_rest[None, :], mask=o_e_rest[None, :] < E, other=0.0)  # [BLOCK_K, E_REST]
                else:
                    b_v_rest = tl.load(p_vn + o_e_rest[None, :])  # [BLOCK_K, E_REST]
                b_o_rest = tl.dot(b_p.to(b_v.dtype), b_v_rest, b_o_rest * b_decay[:, None], input_precision=PRECISION)
            else:
                if E_PADDED:
                    b_v = tl.load(p_vn + o_e[None, :], mask=o_e[None, :] < E, other=0.0)  # [BLOCK_K, E_MAIN]
                else:
                    b_v = tl.load(p_vn + o_e[None, :])  # [BLOCK_K, E_MAIN]
            b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_decay[:, None], input_precision=PRECISION)  # [BLOCK_Q, E_MAIN]

    if (SINK or LSE) and not SCORES:
        b_top = b_top / LOG2E
    if SINK:
        b_sink = tl.reshape(tl.broadcast_to(sink_logit(i_b, i_h, q, row, q_len, kv_len, operands), [BLOCK_Q, 1]), [BLOCK_Q])
        b_new = tl.maximum(b_top, b_sink)
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_decay = tl.exp2((b_top - b_safe) * LOG2E)
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
            b_total = tl.zeros([E_MAIN], tl.float32)
            if E_REST:
                b_total_rest = tl.zeros([E_REST], tl.float32)
            for i_n in range(0, tl.cdiv(kv_len, BLOCK_K)):
                o_n = i_n * BLOCK_K + tl.arange(0, BLOCK_K)
                p_vn = p_v + tl.cast(o_n, tl.int64)[:, None] * s_vn
                b_v = tl.load(p_vn + o_e[None, :], mask=(o_n < kv_len)[:, None] & (o_e < E)[None, :], other=0.0)
                b_total += tl.sum(tl.cast(b_v, tl.float32), 0)
                if E_REST:
                    m_rest = (o_n < kv_len)[:, None] & (o_e_rest < E)[None, :]
                    b_v_rest = tl.load(p_vn + o_e_rest[None, :], mask=m_rest, other=0.0)
                    b_total_rest += tl.sum(tl.cast(b_v_rest, tl.float32), 0)
            b_o = tl.where(m_empty[:, None], (b_total / kv_len)[None, :], b_o)
            if E_REST:
                b_o_rest = tl.where(m_empty[:, None], (b_total_rest / kv_len)[None, :], b_o_rest)

    # The output is contiguous: [batch, heads, q_len, E].
    p_rows = p_o + (tl.cast(i_bh, tl.int64) * q_len + o_m[:, None]) * E
    m_rows = (o_m < q_len)[:, None]
    if E_REST:
        tl.store(p_rows + o_e[None, :], b_o, mask=m_rows)
        if E_PADDED:
            tl.store(p_rows + o_e_rest[None, :], b_o_rest, mask=m_rows & (o_e_rest < E)[None, :])
        else:
            tl.store(p_rows + o_e_rest[None, :], b_o_rest, mask=m_rows)
    else:
        if E_PADDED:
            tl.store(p_rows + o_e[None, :], b_o, mask=m_rows & (o_e < E)[None, :])
        else:
            tl.store(p_rows + o_e[None, :], b_o, mask=m_rows)
    if LSE:
        tl.store(p_lse + tl.cast(i_bh, tl.int64) * q_len + o_m, b_top + tl.log(b_sum), mask=o_m < q_len)  # [batch, heads, q_len]


def attention(q, k, v, tensors=None, o=None):
    """q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E] -> o [B, H, Q, E], and the log-sum-exp [B, H, Q] where the kernel stores it.

    An `o` that is given is written to; it must be contiguous.
    """
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, q_len, _ = q.shape
    if o is None:
        o = torch.empty((batch, heads, q_len, v.shape[3]), dtype=q.dtype, device=q.device)
    if LSE:
        lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    else:
        lse = None
    if o.numel() > 0:
        prefill[(triton.cdiv(q_len, BLOCK_Q.value) * batch * heads,)](
            q, k, v, o, lse,
            tensors,
            q_len, k.shape[2], heads, k.shape[1], v.shape[1],
            q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
    if LSE:
        return o, lse
    else:
        return o
