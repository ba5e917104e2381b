"""What the programs of decode.py that share a row found, put together; and how many shall share it.

    o = sum_s w_s o_s / (sum_s w_s sum_s + w_sink)          w_s = exp(top_s - top), o_s and sum_s relative to the split's own top_s

    grid      one program for each row of the output
    empty     a row for which all splits are empty finds the sum of all values in o_s

Source: "Flash-Decoding for long-context inference".
"""

import functools
import math

import triton
import triton.language as tl

E = tl.constexpr(16)
E_WIDTH = tl.constexpr(16)
MOST_SPLITS = tl.constexpr(128)
RESIDENT = 2
LOG2E = tl.constexpr(1.4426950408889634)
LENGTHS = tl.constexpr(False)
SCORES = tl.constexpr(False)
UNIT = tl.constexpr(1.0)  # what turns a top into a power of two: log2(e) where scores have terms
OFFSET = tl.constexpr(False)
SINK = tl.constexpr(False)
EMPTY_ROWS = tl.constexpr(False)
MEAN_OF_EMPTY = tl.constexpr(False)
LSE = tl.constexpr(False)


@triton.jit
def query_offset(q_len, kv_len):
    """The position of the first query."""
    return 0


@triton.jit
def sink_logit(b, h, q, row, q_len, kv_len, operands):
    """One more logit of each row, which takes weight and gives nothing."""
    return 0.0


@triton.jit
def merge(p_part, p_stats, p_o, p_lse, p_lengths, operands, q_len, kv_len, heads, splits):
    i_r = tl.cast(tl.program_id(0), tl.int64)
    row = tl.program_id(0) % q_len
    if SINK:
        b = i_r // q_len // heads
        h = i_r // q_len % heads
        if LENGTHS:
            kv_len = tl.load(p_lengths + b)
        q = row
        if OFFSET:
            q += query_offset(q_len, kv_len)
    elif LENGTHS and MEAN_OF_EMPTY:
        kv_len = tl.load(p_lengths + i_r // q_len // heads)
    o_s = tl.arange(0, MOST_SPLITS)
    b_tops = tl.load(p_stats + (i_r * splits + o_s) * 2, mask=o_s < splits, other=-float("inf"))  # [MOST_SPLITS]
    b_sums = tl.load(p_stats + (i_r * splits + o_s) * 2 + 1, mask=o_s < splits, other=0.0)
    b_top = tl.max(b_tops, 0)
    if SINK:
        b_sink = sink_logit(b, h, q, row, q_len, kv_len, operands)
        if not SCORES:
            b_sink = b_sink * LOG2E
        b_top = tl.maximum(b_top, b_sink)
    b_safe = tl.where(b_top == -float("inf"), 0.0, b_top)
    b_sum = tl.sum(b_sums * tl.exp2((b_tops - b_safe) * UNIT), 0)
    if SINK:
        b_sum += tl.exp2((b_sink - b_safe) * UNIT)
    if EMPTY_ROWS:
        m_empty = b_sum == 0.0
        b_share = 1.0 / tl.where(m_empty, 1.0, b_sum)
    else:
        b_share = 1.0 / b_sum
    o_e = tl.arange(0, E_WIDTH)
    o_i = tl.arange(0, 8)
    b_o = tl.zeros([E_WIDTH], tl.float32)
    for i in range(0, splits, 8):
        m_i = i + o_i < splits
        p_i = i_r * splits + i + o_i
        b_w = tl.exp2((tl.load(p_stats + p_i * 2, mask=m_i, other=-float("inf")) - b_safe) * UNIT) * b_share  # [8]
        if MEAN_OF_EMPTY:
            b_w = tl.where(m_empty, 1.0 / tl.maximum(kv_len, 1), b_w)
        b_part = tl.load(p_part + p_i[:, None] * E + o_e[None, :], mask=m_i[:, None] & (o_e < E)[None, :], other=0.0)
        b_o += tl.sum(b_part * b_w[:, None], 0)
    tl.store(p_o + i_r * E + o_e, b_o, mask=o_e < E)
    if LSE:
        tl.store(p_lse + i_r, b_top * (UNIT / LOG2E) + tl.log(b_sum))


@functools.cache
def split_count(programs, blocks, processors):
    """How many programs share the keys of one: the fewest that keep the machine nearly as busy as any number would.

    `programs` are there without splitting, each walks over `blocks` blocks, and RESIDENT of them run at a time on each of the
    `processors`. A count is judged by its last wave: n programs in w waves fill n / (w * slots) of the machine. A share of fewer
    than four blocks is not worth its part of the merge.
    """
    slots = processors * RESIDENT
    most = max(1, min(MOST_SPLITS.value, slots, blocks // 4))
    filled = [programs * n / (math.ceil(programs * n / slots) * slots) for n in range(1, most + 1)]
    return next(n for n, share in enumerate(filled, 1) if share >= 0.85 * max(filled))
