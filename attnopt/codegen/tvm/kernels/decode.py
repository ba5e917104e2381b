"""Attention of a few queries on a long cache: keys are split into parts that are attended to on their own and merged in order.

    o[q] = sum_s w_s o_s[q] / sum_s w_s sum_s[q]        w_s = exp(top_s - top), each split s having its own top_s, sum_s and o_s

parallel  over (sequence, key head, split); then over the rows of the output, which merge. How many splits there are depends on
          shapes alone and a row merges them in order, so results do not depend on the number of threads
rows      the query heads that share a key head, for each of their queries: row r is query r // ratio of head r % ratio. Keys are read
          once for all of them
a split   walks over its blocks of BLOCK keys, of those that any of its rows sees. Of ROWS rows at a time: scores S, as sums over
          vectors of channels for KEYS keys at once, each sum in a register; largest score, weights; weighted sums of values, again
          in registers. What it leaves stands in TOPS, SUMS and PARTS, in the order of its rows
S         [ROWS, BLOCK] scores, then weights           QUERIES  the rows as float32, with the scale
ahead     values are asked for while scores are made, and the next keys while values are summed, where several rows share them and the
          cache is much larger than what is near: one row alone waits for memory anyhow
names     tensors are in capitals; i row of a block, j key of a block, at token, lane of a vector

Tokens past the end read the last one again; they get no weight, and their values are not read.
Sources: "Flash-Decoding for long-context inference"; "FlashAttention-2" (the walk).
"""

from tvm.script import tirx as T

from attnopt.codegen.tvm.kernels.decode_cached import BLOCK, E_LANES, PAGE, PAGED, fetch, of_tokens, real
from attnopt.codegen.tvm.kernels.decode_side import (
    SIDE_STORED as D_STORED, SIDE_STORED as E_STORED, SIDE_LEVEL as K_LEVEL, SIDE_STEPS as K_STEPS, SIDE_ZEROS as K_ZEROS,
    SIDE_LEVEL as V_LEVEL, SIDE_STEPS as V_STEPS, SIDE_ZEROS as V_ZEROS,
)  # fmt: skip
from attnopt.codegen.tvm.kernels.decode_digits import K_DIGITS, WORDS, digit_tile, row_as_digits
from attnopt.codegen.tvm.kernels.decode_lanes import rest, whole
from attnopt.codegen.tvm.kernels.decode_rows import D, row_as_float32, shift_of_row
from attnopt.codegen.tvm.kernels.decode_scores import (
    K_SHIFTS,
    KEYS,
    ROWS,
    SCORES,
    UNIT,
    V_SHIFTS,
    V_WEIGHED,
    E,
    adjusted,
    score_tile,
    visible_scores,
    weights,
)
from attnopt.codegen.tvm.kernels.sight import (
    end_key,
    first_key,
    held_values,
    inner_end_key,
    inner_first_key,
    leading_keys,
    match_operands,
    operands,
    query_offset,
    sink_logit,
)
from attnopt.codegen.tvm.kernels.decode_values import AHEAD, E_PARTS, V_LINE, V_LINES, mean_of_values, value_tile
from attnopt.codegen.tvm.kernels.vectors import softmax_weight

INTEGER = False
FAR = 50331648  # bytes of keys and values: with fewer, asking ahead takes more time than it saves
K_BYTES = 4
V_BYTES = 4
TASKS = 64
SPAN = 0
DTYPE = "float32"
K_DTYPE = "float32"
V_DTYPE = "float32"
K_SCALE_DTYPE = "float32"
V_SCALE_DTYPE = "float32"
K_SCALED = False
V_SCALED = False
V_BALANCED = False
K_COLUMNS = 1
V_COLUMNS = 1
LENGTHS = False
OFFSET = False
RANGE = False
LEADING = False
PHASES = False
SINK = False
EMPTY_ROWS = False
MEAN_OF_EMPTY = False
LSE = False
LN2 = 0.6931471805599453


@T.prim_func(s_tir=True)
def attention(
    q: T.handle, k: T.handle, v: T.handle,
    k_scales: T.handle, k_zeros: T.handle, v_scales: T.handle, v_zeros: T.handle, pages: T.handle, lengths: T.handle,
    v_balance: T.handle,
    given: T.handle,
    o: T.handle, lse: T.handle,
):  # fmt: skip
    T.func_attr({"global_symbol": "attention", "tirx.noalias": True})
    batch, heads, q_len, s_qb, s_qh, s_qm = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
    places, key_heads, rows_of_place, s_kb, s_kh, s_kn = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
    value_heads, s_vb, s_vh, s_vn = T.int64(), T.int64(), T.int64(), T.int64()
    Q = T.match_buffer(q, (batch, heads, q_len, D), DTYPE, strides=(s_qb, s_qh, s_qm, 1), align=1)
    K = T.match_buffer(k, (places, key_heads, rows_of_place, D_STORED), K_DTYPE, strides=(s_kb, s_kh, s_kn, 1), align=1)
    V = T.match_buffer(v, (places, value_heads, rows_of_place, E_STORED), V_DTYPE, strides=(s_vb, s_vh, s_vn, 1), align=1)
    if K_SCALED:
        k_places, k_rows = T.int64(), T.int64()
        s_ksb, s_ksh, s_ksn, s_ksc = T.int64(), T.int64(), T.int64(), T.int64()
        K_SCALES = T.match_buffer(
            k_scales, (k_places, key_heads, k_rows, T.int64(K_COLUMNS)), K_SCALE_DTYPE,
            strides=(s_ksb, s_ksh, s_ksn, s_ksc if K_COLUMNS == 1 else T.int64(1)), align=1,
        )  # fmt: skip
        if K_ZEROS:
            s_kzb, s_kzh, s_kzn, s_kzc = T.int64(), T.int64(), T.int64(), T.int64()
            K_POINTS = T.match_buffer(
                k_zeros, (k_places, key_heads, k_rows, T.int64(K_COLUMNS)), K_SCALE_DTYPE,
                strides=(s_kzb, s_kzh, s_kzn, s_kzc if K_COLUMNS == 1 else T.int64(1)), align=1,
            )  # fmt: skip
    if V_SCALED:
        v_places, v_rows = T.int64(), T.int64()
        s_vsb, s_vsh, s_vsn, s_vsc = T.int64(), T.int64(), T.int64(), T.int64()
        V_SCALES = T.match_buffer(
            v_scales, (v_places, value_heads, v_rows, T.int64(V_COLUMNS)), V_SCALE_DTYPE,
            strides=(s_vsb, s_vsh, s_vsn, s_vsc if V_COLUMNS == 1 else T.int64(1)), align=1,
        )  # fmt: skip
        if V_ZEROS:
            s_vzb, s_vzh, s_vzn, s_vzc = T.int64(), T.int64(), T.int64(), T.int64()
            V_POINTS = T.match_buffer(
                v_zeros, (v_places, value_heads, v_rows, T.int64(V_COLUMNS)), V_SCALE_DTYPE,
                strides=(s_vzb, s_vzh, s_vzn, s_vzc if V_COLUMNS == 1 else T.int64(1)), align=1,
            )  # fmt: skip
    if V_BALANCED:
        v_blocks, s_vbb, s_vbh, s_vbn = T.int64(), T.int64(), T.int64(), T.int64()
        BALANCE = T.match_buffer(v_balance, (v_places, value_heads, v_blocks, E), "float32", strides=(s_vbb, s_vbh, s_vbn, 1), align=1)
    if PAGED:
        most_pages = T.int64()
        PAGES = T.match_buffer(pages, (batch, most_pages), "int32", align=1)
    if LENGTHS:
        TOKENS = T.match_buffer(lengths, (batch,), "int32", align=1)
    match_operands()
    OUTPUT = T.match_buffer(o, (batch, heads, q_len, E), DTYPE, align=1)
    if LSE:
        LOG_SUMS = T.match_buffer(lse, (batch, heads, q_len), "float32", align=1)

    # Rows that share keys and values: of the two head ratios the smaller, where it divides the other.
    k_ratio: T.let = whole(heads, key_heads)
    v_ratio: T.let = whole(heads, value_heads)
    ratio: T.let = T.Select(rest(k_ratio, v_ratio) == 0, v_ratio, T.Select(rest(v_ratio, k_ratio) == 0, k_ratio, T.int64(1)))
    groups: T.let = whole(heads, ratio)
    rows: T.let = q_len * ratio
    padded: T.let = whole(rows + ROWS - 1, ROWS) * ROWS
    if PAGED:
        longest: T.let = most_pages * PAGE
    else:
        longest: T.let = rows_of_place
    if SPAN:
        most_blocks: T.let = whole(T.min(longest, SPAN + q_len) + BLOCK - 1, BLOCK)
    else:
        most_blocks: T.let = whole(longest + BLOCK - 1, BLOCK)
    splits: T.let = T.max(T.min(whole(TASKS - 1, batch * groups) + 1, whole(most_blocks, 2)), 1)

    QUERIES = T.alloc_buffer((batch * groups, padded, D), "float32")
    if INTEGER:
        DIGITS = T.alloc_buffer((batch * groups, padded, K_DIGITS, D // 4), "int32")
        UNITS = T.alloc_buffer((batch * groups, padded), "float32")
    if K_SHIFTS:
        SHIFTS = T.alloc_buffer((batch * groups, padded), "float32")
    for group in T.parallel(batch * groups):
        for r in range(padded):
            row_as_float32(QUERIES, Q, K_SCALES, group, whole(group, groups), rest(group, groups), r, ratio, k_ratio, rows)
            if INTEGER:
                row_as_digits(DIGITS, UNITS, QUERIES, group, r)
            if K_SHIFTS:
                shift_of_row(
                    SHIFTS, QUERIES, K_POINTS, group, whole(group, groups), whole(rest(group, groups) * ratio, k_ratio), r
                )

    TOPS = T.alloc_buffer((batch * groups * splits, padded), "float32")
    SUMS = T.alloc_buffer((batch * groups * splits, padded), "float32")
    if V_SHIFTS:
        V_SHIFTED = T.alloc_buffer((batch * groups * splits, padded), "float32")
    PARTS = T.alloc_buffer((batch * groups * splits, padded, E), "float32")
    for task in T.parallel(batch * groups * splits):
        shared: T.int64 = ratio
        b: T.int64 = whole(task, splits * groups)
        g: T.int64 = rest(whole(task, splits), groups)
        group: T.int64 = whole(task, splits)
        k_head: T.int64 = whole(g * shared, k_ratio)
        v_head: T.int64 = whole(g * shared, v_ratio)
        row_count: T.int64 = rows
        tiles: T.int64 = whole(padded, ROWS)
        S = T.alloc_buffer((ROWS, BLOCK), "float32")
        if AHEAD:
            far: T.bool = batch * (key_heads * D_STORED * K_BYTES + value_heads * E_STORED * V_BYTES) * longest > FAR
        if K_STEPS == "token":
            K_STEP = T.alloc_buffer((BLOCK,), "float32")
            if K_ZEROS:
                K_ZERO = T.alloc_buffer((BLOCK,), "float32")
        if V_WEIGHED:
            V_STEP = T.alloc_buffer((BLOCK,), "float32")
            if V_SHIFTS and V_ZEROS:
                V_ZERO = T.alloc_buffer((BLOCK,), "float32")
        if LENGTHS:
            kv_len: T.int64 = T.cast(TOKENS[b], "int64")
        else:
            kv_len: T.int64 = longest
        if OFFSET:
            offset: T.int64 = T.cast(query_offset(q_len, kv_len), "int64")
        else:
            offset: T.int64 = T.int64(0)
        for r in range(tiles * ROWS):
            TOPS[task, r] = T.float32("-inf")
            SUMS[task, r] = T.float32(0)
            if V_SHIFTS:
                V_SHIFTED[task, r] = T.float32(0)
            for e in range(E):
                PARTS[task, r, e] = T.float32(0)
        # Blocks of keys that the rows see, first … end and 0 … leading; of them this task takes the steps start … stop.
        if RANGE:
            first_seen: T.int64 = T.cast(first_key(offset, offset + q_len - 1, q_len, kv_len), "int64")
            end_seen: T.int64 = T.cast(end_key(offset, offset + q_len - 1, q_len, kv_len), "int64")
            first: T.int64 = whole(T.max(first_seen, 0), BLOCK)
            end: T.int64 = T.max(whole(T.max(T.min(end_seen, kv_len), 0) + BLOCK - 1, BLOCK), first)
        else:
            first: T.int64 = T.int64(0)
            end: T.int64 = whole(kv_len + BLOCK - 1, BLOCK)
        if LEADING:
            leading: T.int64 = T.min(whole(T.max(T.min(leading_keys(q_len, kv_len), kv_len), 0) + BLOCK - 1, BLOCK), first)
            steps: T.int64 = end - first + leading
        else:
            steps: T.int64 = end - first
        share: T.int64 = whole(steps + splits - 1, splits)
        start: T.int64 = T.min(rest(task, splits) * share, steps)
        if RANGE:
            inner_first: T.int64 = T.cast(inner_first_key(offset, offset + q_len - 1, q_len, kv_len), "int64")
            inner_end: T.int64 = T.min(inner_end_key(offset, offset + q_len - 1, q_len, kv_len), kv_len)
        else:
            inner_first: T.int64 = T.int64(0)
            inner_end: T.int64 = kv_len

        @T.inline
        def attend(token, tile, inner, ahead):
            """ROWS rows on a block of keys; ahead: what is read next is asked for meanwhile."""
            if INTEGER:
                for j in range(whole(T.min(kv_len - token, BLOCK) + WORDS - 1, WORDS)):
                    digit_tile(S, DIGITS, UNITS, K, PAGES, group, b, k_head, tile * ROWS, token, j * WORDS, kv_len)
            else:
                for j in range(whole(T.min(kv_len - token, BLOCK) + KEYS - 1, KEYS)):
                    if AHEAD:
                        if ahead:
                            fetch(V, PAGES, KEYS, V_LINES, V_LINE, b, v_head, token + j * KEYS, kv_len)
                    score_tile(S, QUERIES, K, K_SCALES, K_POINTS, PAGES, group, b, k_head, tile * ROWS, token, j * KEYS, kv_len)
            if K_SHIFTS or K_STEPS == "token":
                adjusted(S, SHIFTS, K_STEP, K_ZERO, group, tile * ROWS)
            visible_scores(S, b, g, shared, row_count, tile * ROWS, token, inner, offset, q_len, kv_len, operands)
            weights(S, TOPS, SUMS, V_SHIFTED, PARTS, V_STEP, V_ZERO, task, tile * ROWS)
            for part in T.unroll(E // (E_PARTS * E_LANES)):
                if V_BALANCED:
                    value_tile(
                        S, PARTS, V, BALANCE, V_POINTS, K, PAGES, task, b, v_head, k_head, tile * ROWS, token,
                        T.min(kv_len - token, BLOCK), kv_len, part, ahead,
                    )  # fmt: skip
                else:
                    value_tile(
                        S, PARTS, V, V_SCALES, V_POINTS, K, PAGES, task, b, v_head, k_head, tile * ROWS, token,
                        T.min(kv_len - token, BLOCK), kv_len, part, ahead,
                    )  # fmt: skip

        for step in range(T.min(share, steps - start)):
            if LEADING:
                block: T.int64 = T.if_then_else(start + step < leading, start + step, start + step - leading + first)
            else:
                block: T.int64 = start + step + first
            token: T.int64 = block * BLOCK
            if PHASES:
                inner: T.bool = T.bool(False)
            else:
                inner: T.bool = token >= inner_first and token + BLOCK <= inner_end
            if K_STEPS == "token":
                of_tokens(K_STEP, K_SCALES, PAGES, b, k_head, token, kv_len, 0.0)
                if K_ZEROS:
                    of_tokens(K_ZERO, K_POINTS, PAGES, b, k_head, token, kv_len, K_LEVEL)
            if V_WEIGHED:
                of_tokens(V_STEP, V_SCALES, PAGES, b, v_head, token, kv_len, 0.0)
                if V_SHIFTS and V_ZEROS:
                    of_tokens(V_ZERO, V_POINTS, PAGES, b, v_head, token, kv_len, V_LEVEL)
            for tile in range(tiles):
                if AHEAD:
                    if far and tile == 0:
                        attend(token, tile, inner, True)
                    else:
                        attend(token, tile, inner, False)
                else:
                    attend(token, tile, inner, False)

    for at in T.parallel(batch * heads * q_len):
        b: T.int64 = whole(at, q_len * heads)
        h: T.int64 = rest(whole(at, q_len), heads)
        row: T.int64 = rest(at, q_len)
        g: T.int64 = whole(h, ratio)
        v_head: T.int64 = whole(h, v_ratio)
        r: T.int64 = row * ratio + rest(h, ratio)
        X = T.alloc_buffer((E,), "float32")
        if LENGTHS:
            kv_len: T.int64 = T.cast(TOKENS[b], "int64")
        else:
            kv_len: T.int64 = longest
        top: T.float32 = T.float32("-inf")
        for s in range(splits):
            top = T.max(top, TOPS[(b * groups + g) * splits + s, r])
        if SINK:
            if OFFSET:
                position: T.int64 = row + query_offset(q_len, kv_len)
            else:
                position: T.int64 = row
            logit: T.float32 = sink_logit(b, h, position, row, q_len, kv_len, operands, held_values)
            if not SCORES:
                logit = logit * T.float32(1.0 / LN2)
            top = T.max(top, logit)
        safe: T.float32 = T.if_then_else(top == T.float32("-inf"), T.float32(0), top)
        total: T.float32 = T.float32(0)
        shift: T.float32 = T.float32(0)
        for e in range(E):
            X[e] = T.float32(0)
        for s in range(splits):
            weight: T.float32 = softmax_weight((TOPS[(b * groups + g) * splits + s, r] - safe) * T.float32(UNIT))
            total = total + weight * SUMS[(b * groups + g) * splits + s, r]
            if V_STEPS == "token" and V_SHIFTS:
                shift = shift + weight * V_SHIFTED[(b * groups + g) * splits + s, r]
            for e in range(E):
                X[e] = X[e] + weight * PARTS[(b * groups + g) * splits + s, r, e]
        all_weight: T.float32 = total
        if SINK:
            all_weight = all_weight + softmax_weight((logit - safe) * T.float32(UNIT))
        if LSE:
            LOG_SUMS[b, h, row] = top * T.float32(UNIT * LN2) + T.log(all_weight)
        if MEAN_OF_EMPTY:
            sees_none: T.bool = all_weight == T.float32(0)
            if sees_none:
                mean_of_values(X, V, V_SCALES, V_POINTS, PAGES, b, v_head, kv_len)
                total = T.float32(1)
        if V_STEPS == "channel":
            for e in range(E):
                if V_ZEROS:
                    X[e] = X[e] + total * (real(V_POINTS[b, v_head, 0, e]) + T.float32(V_LEVEL))
                elif V_LEVEL:
                    X[e] = X[e] + total * T.float32(V_LEVEL)
                X[e] = X[e] * real(V_SCALES[b, v_head, 0, e])
        if EMPTY_ROWS:
            all_weight = T.Select(all_weight == T.float32(0), T.float32(1), all_weight)
        for e in range(E):
            OUTPUT[b, h, row, e] = T.cast((X[e] + shift) / all_weight, DTYPE)
