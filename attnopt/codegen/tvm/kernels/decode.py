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
names     tensors are in capitals; i row of a block, j key of a block, at token, l lane of a vector

Tokens past the end read the last one again; they get no weight, and their values are not read.
Sources: "Flash-Decoding for long-context inference"; "FlashAttention-2" (the walk).
"""

from tvm.script import tirx as T

from attnopt.codegen.tvm.kernels.decode_cached import (
    BLOCK,
    D_LANES,
    D_STORED,
    E_LANES,
    E_STORED,
    K_LEVEL,
    K_STEPS,
    K_ZEROS,
    PAGE,
    PAGED,
    V_LEVEL,
    V_STEPS,
    V_ZEROS,
    key_number,
    of_tokens,
    place_of,
    real,
    row_of,
    value_number,
)
from attnopt.codegen.tvm.kernels.decode_sight import (
    end_inner_key,
    end_key,
    first_inner_key,
    first_key,
    inner_mask_mod,
    leading_keys,
    mask_mod,
    query_offset,
    score_mod,
    sink_logit,
)
from attnopt.codegen.tvm.kernels.decode_vectors import across, exp2, paired, plus, vector

D = 16
E = 16
ROWS = 4
KEYS = 4
LANES = 16
PIECE = 4
FOLDED = True
E_PARTS = 1
TASKS = 64
SPAN = 0
DTYPE = "float32"
K_DTYPE = "float32"
V_DTYPE = "float32"
K_SCALE_DTYPE = "float32"
V_SCALE_DTYPE = "float32"
SCALE = 1.0
UNIT = 1.0
SCORES = False
K_SCALED = False
V_SCALED = False
K_SHIFTS = False
V_SHIFTS = False
LENGTHS = False
OFFSET = False
RANGE = False
LEADING = False
MASK = False
INNER_MASK = False
PHASES = False
SINK = False
EMPTY_ROWS = False
MEAN_OF_EMPTY = False
LSE = False
LN2 = 0.6931471805599453


def whole(a, b):
    """a // b of numbers that are not negative: without the correction of signs, which TVM writes out where it cannot prove it away."""
    return T.truncdiv(a, b)


def rest(a, b):
    """a % b of numbers that are not negative."""
    return T.truncmod(a, b)


def unrolled(count):
    """A loop that is written out unless it is long."""
    return T.unroll(count) if count <= 16 else T.serial(count)


@T.inline
def folded(sums):
    """sums[i // D_LANES, i % D_LANES]: the sum over the lanes of sums[i]."""


@T.inline
def rows_as_float32(QUERIES, SHIFTS, Q, K_SCALES, K_POINTS, b, head, g, ratio, rows):
    """The rows with the scale and with steps by channel; SHIFTS: what zero points add to each score of a row."""
    for r in range(whole(rows + ROWS - 1, ROWS) * ROWS):
        h: T.int64 = g * ratio + rest(T.min(r, rows - 1), ratio)
        row: T.int64 = whole(T.min(r, rows - 1), ratio)
        for d in unrolled(D // D_LANES):
            for l in T.vectorized(D_LANES):
                QUERIES[r, d * D_LANES + l] = real(Q[b, h, row, d * D_LANES + l]) * T.float32(SCALE)
        if K_STEPS == "channel":
            for d in range(D):
                QUERIES[r, d] = QUERIES[r, d] * real(K_SCALES[b, head, 0, d])
        if K_SHIFTS:
            SHIFTS[r] = T.float32(0)
            for d in range(D):
                if K_STEPS == "channel":
                    if K_ZEROS:
                        SHIFTS[r] = SHIFTS[r] + QUERIES[r, d] * (real(K_POINTS[b, head, 0, d]) + T.float32(K_LEVEL))
                    else:
                        SHIFTS[r] = SHIFTS[r] + QUERIES[r, d] * T.float32(K_LEVEL)
                else:
                    SHIFTS[r] = SHIFTS[r] + QUERIES[r, d]


@T.inline
def score_tile(S, QUERIES, K, K_SCALES, K_POINTS, PAGES, b, head, r, first, j, kv_len):
    """S[i, j + key]: the products of rows r + i with the keys first + j + key."""
    sums = T.alloc_buffer((ROWS * KEYS, D_LANES), "float32", scope="local")
    for i in T.unroll(ROWS * KEYS):
        for l in T.vectorized(D_LANES):
            sums[i, l] = T.float32(0)
    for d in unrolled(D // D_LANES):
        for key in T.unroll(KEYS):
            at: T.let = T.min(first + j + key, kv_len - 1)
            place: T.let = place_of(PAGES, b, at)
            x = T.alloc_buffer((D_LANES,), "float32", scope="local")
            for l in T.vectorized(D_LANES):
                x[l] = key_number(K, K_SCALES, K_POINTS, place, head, row_of(at), d * D_LANES, l)
            for i in T.unroll(ROWS):
                for l in T.vectorized(D_LANES):
                    sums[i * KEYS + key, l] += QUERIES[r + i, d * D_LANES + l] * x[l]
    if FOLDED:
        folded(sums)
    for i in T.unroll(ROWS * KEYS // PIECE):
        S[i * PIECE // KEYS, vector(j + i * PIECE % KEYS, PIECE)] = sums[i * PIECE // D_LANES, vector(i * PIECE % D_LANES, PIECE)]


@T.inline
def adjusted(S, SHIFTS, K_STEP, K_ZERO, r):
    """Scores after what steps and zero points add to them."""
    for i in range(ROWS):
        for c in range(BLOCK // LANES):
            for l in T.vectorized(LANES):
                if K_STEPS == "token":
                    if K_ZEROS:
                        S[i, c * LANES + l] = (S[i, c * LANES + l] + SHIFTS[r + i] * K_ZERO[c * LANES + l]) * K_STEP[c * LANES + l]
                    elif K_SHIFTS:
                        S[i, c * LANES + l] = (S[i, c * LANES + l] + SHIFTS[r + i] * T.float32(K_LEVEL)) * K_STEP[c * LANES + l]
                    else:
                        S[i, c * LANES + l] = S[i, c * LANES + l] * K_STEP[c * LANES + l]
                else:
                    S[i, c * LANES + l] = S[i, c * LANES + l] + SHIFTS[r + i]


@T.inline
def visible_scores(S, b, g, ratio, rows, r, first, inner, offset, q_len, kv_len, operands):
    """Scores after the terms of the spec, minus infinity where a row does not see a key."""
    for i in range(ROWS):
        h: T.int64 = g * ratio + rest(T.min(r + i, rows - 1), ratio)
        row: T.int64 = whole(T.min(r + i, rows - 1), ratio)
        q: T.int64 = row + offset
        if SCORES:
            for j in range(BLOCK):
                score_mod(S, i, j, b, h, q, row, T.min(first + j, kv_len - 1), q_len, kv_len, operands)
        if not inner:
            if MASK:
                for j in range(BLOCK):
                    mask_mod(S, i, j, b, h, q, row, T.min(first + j, kv_len - 1), q_len, kv_len, operands)
            for j in range(T.min(kv_len - first, BLOCK), BLOCK):
                S[i, j] = T.float32(float("-inf"))
        elif INNER_MASK:
            for j in range(BLOCK):
                inner_mask_mod(S, i, j, b, h, q, row, first + j, q_len, kv_len, operands)


@T.inline
def weights(S, TOPS, SUMS, V_SHIFTED, PARTS, V_STEP, V_ZERO, task, r):
    """Scores as weights relative to the largest score so far; what was found before is made relative to that too."""
    for i in range(ROWS):
        top = T.alloc_buffer((LANES,), "float32", scope="local")
        total = T.alloc_buffer((LANES,), "float32", scope="local")
        decay = T.alloc_buffer((LANES,), "float32", scope="local")
        for l in T.vectorized(LANES):
            top[l] = TOPS[task, r + i]
        for c in range(BLOCK // LANES):
            for l in T.vectorized(LANES):
                top[l] = T.max(top[l], S[i, c * LANES + l])
        top[vector(0, LANES)] = across(T.max, top[vector(0, LANES)], LANES)
        # Rows that have seen nothing yet: exp2(-inf - 0) is 0, -inf - -inf would be NaN.
        safe: T.float32 = T.if_then_else(top[0] == T.float32(float("-inf")), T.float32(0), top[0])
        for l in T.vectorized(LANES):
            decay[l] = exp2((TOPS[task, r + i] - safe) * T.float32(UNIT))
            total[l] = T.float32(0)
        TOPS[task, r + i] = top[0]
        for c in range(BLOCK // LANES):
            for l in T.vectorized(LANES):
                S[i, c * LANES + l] = exp2((S[i, c * LANES + l] - safe) * T.float32(UNIT))
            for l in T.vectorized(LANES):
                total[l] += S[i, c * LANES + l]
        total[vector(0, LANES)] = across(plus, total[vector(0, LANES)], LANES)
        SUMS[task, r + i] = SUMS[task, r + i] * decay[0] + total[0]
        if V_STEPS == "token":
            if V_SHIFTS:
                for l in T.vectorized(LANES):
                    total[l] = T.float32(0)
            for c in range(BLOCK // LANES):
                for l in T.vectorized(LANES):
                    S[i, c * LANES + l] = S[i, c * LANES + l] * V_STEP[c * LANES + l]
                if V_SHIFTS:
                    for l in T.vectorized(LANES):
                        if V_ZEROS:
                            total[l] += S[i, c * LANES + l] * V_ZERO[c * LANES + l]
                        else:
                            total[l] += S[i, c * LANES + l] * T.float32(V_LEVEL)
            if V_SHIFTS:
                total[vector(0, LANES)] = across(plus, total[vector(0, LANES)], LANES)
                V_SHIFTED[task, r + i] = V_SHIFTED[task, r + i] * decay[0] + total[0]
        for e in unrolled(E // E_LANES):
            for l in T.vectorized(E_LANES):
                PARTS[task, r + i, e * E_LANES + l] = PARTS[task, r + i, e * E_LANES + l] * decay[0]


@T.inline
def value_tile(S, PARTS, V, V_SCALES, V_POINTS, PAGES, task, b, head, r, first, count, part):
    """PARTS of rows r + i, channels of part `part`: plus weights times values of `count` tokens."""
    sums = T.alloc_buffer((ROWS * E_PARTS, E_LANES), "float32", scope="local")
    for i in T.unroll(ROWS):
        for e in T.unroll(E_PARTS):
            for l in T.vectorized(E_LANES):
                sums[i * E_PARTS + e, l] = PARTS[task, r + i, (part * E_PARTS + e) * E_LANES + l]
    for j in range(count):
        place: T.let = place_of(PAGES, b, first + j)
        for e in T.unroll(E_PARTS):
            x = T.alloc_buffer((E_LANES,), "float32", scope="local")
            for l in T.vectorized(E_LANES):
                x[l] = value_number(V, V_SCALES, V_POINTS, place, head, row_of(first + j), (part * E_PARTS + e) * E_LANES, l)
            for i in T.unroll(ROWS):
                for l in T.vectorized(E_LANES):
                    sums[i * E_PARTS + e, l] += S[i, j] * x[l]
    for i in T.unroll(ROWS):
        for e in T.unroll(E_PARTS):
            for l in T.vectorized(E_LANES):
                PARTS[task, r + i, (part * E_PARTS + e) * E_LANES + l] = sums[i * E_PARTS + e, l]


@T.inline
def mean_of_values(X, V, V_SCALES, V_POINTS, PAGES, b, head, kv_len):
    """X: the mean of all values, which a row gets that sees none."""
    for e in range(E):
        X[e] = T.float32(0)
    for at in range(kv_len):
        for e in range(E):
            if V_STEPS == "token":
                if V_ZEROS:
                    X[e] = X[e] + (
                        value_number(V, V_SCALES, V_POINTS, place_of(PAGES, b, at), head, row_of(at), e, 0)
                        + real(V_POINTS[place_of(PAGES, b, at), head, row_of(at), 0]) + T.float32(V_LEVEL)
                    ) * real(V_SCALES[place_of(PAGES, b, at), head, row_of(at), 0])  # fmt: skip
                else:
                    X[e] = X[e] + (
                        value_number(V, V_SCALES, V_POINTS, place_of(PAGES, b, at), head, row_of(at), e, 0) + T.float32(V_LEVEL)
                    ) * real(V_SCALES[place_of(PAGES, b, at), head, row_of(at), 0])
            else:
                X[e] = X[e] + value_number(V, V_SCALES, V_POINTS, place_of(PAGES, b, at), head, row_of(at), e, 0)
    for e in range(E):
        X[e] = X[e] / real(T.max(kv_len, 1))


@T.prim_func(s_tir=True)
def attention(
    q: T.handle, k: T.handle, v: T.handle,
    k_scales: T.handle, k_zeros: T.handle, v_scales: T.handle, v_zeros: T.handle, pages: T.handle, lengths: T.handle,
    tensors: T.handle,
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
        k_places, k_rows, k_columns = T.int64(), T.int64(), T.int64()
        K_SCALES = T.match_buffer(k_scales, (k_places, key_heads, k_rows, k_columns), K_SCALE_DTYPE, align=1)
        if K_ZEROS:
            K_POINTS = T.match_buffer(k_zeros, (k_places, key_heads, k_rows, k_columns), K_SCALE_DTYPE, align=1)
    if V_SCALED:
        v_places, v_rows, v_columns = T.int64(), T.int64(), T.int64()
        V_SCALES = T.match_buffer(v_scales, (v_places, value_heads, v_rows, v_columns), V_SCALE_DTYPE, align=1)
        if V_ZEROS:
            V_POINTS = T.match_buffer(v_zeros, (v_places, value_heads, v_rows, v_columns), V_SCALE_DTYPE, align=1)
    if PAGED:
        most_pages = T.int64()
        PAGES = T.match_buffer(pages, (batch, most_pages), "int32", align=1)
    if LENGTHS:
        TOKENS = T.match_buffer(lengths, (batch,), "int32", align=1)
    operand_buffers()
    O = T.match_buffer(o, (batch, heads, q_len, E), DTYPE, align=1)
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

    TOPS = T.alloc_buffer((batch * groups * splits, padded), "float32")
    SUMS = T.alloc_buffer((batch * groups * splits, padded), "float32")
    if V_SHIFTS:
        V_SHIFTED = T.alloc_buffer((batch * groups * splits, padded), "float32")
    PARTS = T.alloc_buffer((batch * groups * splits, padded, E), "float32")
    for task in T.parallel(batch * groups * splits):
        shared: T.int64 = ratio
        b: T.int64 = whole(task, splits * groups)
        g: T.int64 = rest(whole(task, splits), groups)
        k_head: T.int64 = whole(g * shared, k_ratio)
        v_head: T.int64 = whole(g * shared, v_ratio)
        row_count: T.int64 = rows
        tiles: T.int64 = whole(padded, ROWS)
        S = T.alloc_buffer((ROWS, BLOCK), "float32")
        QUERIES = T.alloc_buffer((padded, D), "float32")
        if K_SHIFTS:
            SHIFTS = T.alloc_buffer((padded,), "float32")
        if K_STEPS == "token":
            K_STEP = T.alloc_buffer((BLOCK,), "float32")
            if K_ZEROS:
                K_ZERO = T.alloc_buffer((BLOCK,), "float32")
        if V_STEPS == "token":
            V_STEP = T.alloc_buffer((BLOCK,), "float32")
            if V_ZEROS:
                V_ZERO = T.alloc_buffer((BLOCK,), "float32")
        if LENGTHS:
            kv_len: T.int64 = T.cast(TOKENS[b], "int64")
        else:
            kv_len: T.int64 = longest
        if OFFSET:
            offset: T.int64 = T.cast(query_offset(q_len, kv_len), "int64")
        else:
            offset: T.int64 = T.int64(0)
        rows_as_float32(QUERIES, SHIFTS, Q, K_SCALES, K_POINTS, b, k_head, g, shared, row_count)
        for r in range(tiles * ROWS):
            TOPS[task, r] = T.float32(float("-inf"))
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
            inner_first: T.int64 = T.cast(first_inner_key(offset, offset + q_len - 1, q_len, kv_len), "int64")
            inner_end: T.int64 = T.min(end_inner_key(offset, offset + q_len - 1, q_len, kv_len), kv_len)
        else:
            inner_first: T.int64 = T.int64(0)
            inner_end: T.int64 = kv_len
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
            if V_STEPS == "token":
                of_tokens(V_STEP, V_SCALES, PAGES, b, v_head, token, kv_len, 0.0)
                if V_ZEROS:
                    of_tokens(V_ZERO, V_POINTS, PAGES, b, v_head, token, kv_len, V_LEVEL)
            for tile in range(tiles):
                for j in range(BLOCK // KEYS):
                    score_tile(S, QUERIES, K, K_SCALES, K_POINTS, PAGES, b, k_head, tile * ROWS, token, j * KEYS, kv_len)
                if K_SHIFTS or K_STEPS == "token":
                    adjusted(S, SHIFTS, K_STEP, K_ZERO, tile * ROWS)
                visible_scores(S, b, g, shared, row_count, tile * ROWS, token, inner, offset, q_len, kv_len, operands)
                weights(S, TOPS, SUMS, V_SHIFTED, PARTS, V_STEP, V_ZERO, task, tile * ROWS)
                for part in T.unroll(E // (E_PARTS * E_LANES)):
                    value_tile(
                        S, PARTS, V, V_SCALES, V_POINTS, PAGES, task, b, v_head, tile * ROWS, token,
                        T.min(kv_len - token, BLOCK), part,
                    )  # fmt: skip

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
        top: T.float32 = T.float32(float("-inf"))
        for s in range(splits):
            top = T.max(top, TOPS[(b * groups + g) * splits + s, r])
        if SINK:
            logit = T.alloc_buffer((1,), "float32", scope="local")
            if OFFSET:
                sink_logit(logit, b, h, row + query_offset(q_len, kv_len), row, q_len, kv_len, operands)
            else:
                sink_logit(logit, b, h, row, row, q_len, kv_len, operands)
            if not SCORES:
                logit[0] = logit[0] * T.float32(1.0 / LN2)
            top = T.max(top, logit[0])
        safe: T.float32 = T.if_then_else(top == T.float32(float("-inf")), T.float32(0), top)
        total: T.float32 = T.float32(0)
        shift: T.float32 = T.float32(0)
        for e in range(E):
            X[e] = T.float32(0)
        for s in range(splits):
            weight: T.float32 = exp2((TOPS[(b * groups + g) * splits + s, r] - safe) * T.float32(UNIT))
            total = total + weight * SUMS[(b * groups + g) * splits + s, r]
            if V_STEPS == "token":
                if V_SHIFTS:
                    shift = shift + weight * V_SHIFTED[(b * groups + g) * splits + s, r]
            for e in range(E):
                X[e] = X[e] + weight * PARTS[(b * groups + g) * splits + s, r, e]
        all_weight: T.float32 = total
        if SINK:
            all_weight = all_weight + exp2((logit[0] - safe) * T.float32(UNIT))
        if LSE:
            LOG_SUMS[b, h, row] = top * T.float32(UNIT * LN2) + T.log(all_weight)
        if MEAN_OF_EMPTY:
            if all_weight == T.float32(0):
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
            if all_weight == T.float32(0):
                all_weight = T.float32(1)
        for e in range(E):
            O[b, h, row, e] = T.cast((X[e] + shift) / all_weight, DTYPE)
