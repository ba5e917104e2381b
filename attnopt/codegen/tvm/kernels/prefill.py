"""Attention of many queries on a CPU: softmax over streamed blocks of keys, which are never all in memory.

    o[q] = sum_k exp(s[q, k] - top) v[k] / sum_k exp(s[q, k] - top)         s = score_mod(q k' * SCALE), -inf where hidden

    items     one for each block of BLOCK_Q queries of one head, in parallel; each is computed by one thread, alone
    lanes     queries stand side by side in vectors, BLOCK_Q = VECTORS * LANES: everything is transposed (_t), so that the largest
              score and the sum of a query are those of its lane, and keys and values are read as they stand in memory
    registers a tile of KEYS keys (CHANNELS channels of the output) x BLOCK_Q queries; each element of k (v) is multiplied with
              VECTORS vectors of q_t (s_t)
    ranges    first_key … end_key are seen by some query of the block, inner_first_key … inner_end_key by all: those need no mask.
              What lies outside is not read
    pieces    of CHUNK keys are visited or not where data decides: see prefill_visits.py
    names     i_ index of a block, s_ stride, n_ size   q_t [D, BLOCK_Q]   s_t [BLOCK_K, BLOCK_Q] scores, then weights
              o_t [E, BLOCK_Q] sums of values   top, total, decay [BLOCK_Q]

Lanes past the last query repeat it, and are not stored. Source: "FlashAttention-2: Faster Attention with Better Parallelism and Work
Partitioning".
"""

from tvm.script import tirx as T

from attnopt.codegen.tvm.kernels.prefill_codes import CODED, KEY_MEAN, SHIFTED, WORDS, code_all_keys, code_queries, coded_scores
from attnopt.codegen.tvm.kernels.prefill_holes import (
    BLOCK_K, BLOCK_Q, CHANNELS, CHANNELS_REST, CHUNK, D, DTYPE, E, EDGES, EMPTY_ROWS, GROWS, HELD, HELD_ANY, HELD_WHOLE,
    INNER_MASK, KEYS, K_NORM, LANES, LEADING, LISTED, LSE, MASK, MATCH_HEADS, MATCHES, MEAN_OF_EMPTY, NORMS, OFFSET, PHASES,
    PIECES, PIECES_ANY, PIECES_WHOLE, RANGE, SCALE, SCORES, SINK, SKIP, SKIPS, STAGED, TILES, TILES_ANY, TILES_WHOLE, TOP, UNIT,
    VECTORS, VISITS, WHOLE, hold_piece, hold_rows, hold_tile,
)  # fmt: skip
from attnopt.codegen.tvm.kernels.prefill_norms import norm_all_keys, norm_queries
from attnopt.codegen.tvm.kernels.prefill_rows import average_empty, read_queries, write_rows
from attnopt.codegen.tvm.kernels.prefill_visits import all_match, is_chosen, match_all_keys, match_queries, may_match
from attnopt.codegen.tvm.kernels.sight import (
    between, end_key, first_key, held_values, inner_end_key, inner_first_key, inner_mask_mod, leading_keys, mask_mod, match_operands,
    operands, query_offset, score_mod, sink_logit,
)  # fmt: skip
from attnopt.codegen.tvm.kernels.vectors import softmax_weight


@T.prim_func(s_tir=True)
def attention(p_q: T.handle, p_k: T.handle, p_v: T.handle, given: T.handle, p_o: T.handle, p_lse: T.handle):
    T.func_attr({"global_symbol": "attention", "tirx.noalias": True})
    n_b, n_h, n_g, n_e, n_q, n_k = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
    s_qb, s_qh, s_qm, s_kb, s_kh, s_kn = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
    s_vb, s_vh, s_vn = T.int64(), T.int64(), T.int64()
    q = T.match_buffer(p_q, (n_b, n_h, n_q, D), DTYPE, strides=(s_qb, s_qh, s_qm, 1), align=1)
    k = T.match_buffer(p_k, (n_b, n_g, n_k, D), DTYPE, strides=(s_kb, s_kh, s_kn, 1))
    v = T.match_buffer(p_v, (n_b, n_e, n_k, E), DTYPE, strides=(s_vb, s_vh, s_vn, 1))
    match_operands()
    s_ob, s_oh, s_om = T.int64(), T.int64(), T.int64()
    o = T.match_buffer(p_o, (n_b, n_h, n_q, E), DTYPE, strides=(s_ob, s_oh, s_om, 1), align=1)
    if LSE:
        s_lb, s_lh, s_lm = T.int64(), T.int64(), T.int64()
        lse = T.match_buffer(p_lse, (n_b, n_h, n_q), "float32", strides=(s_lb, s_lh, s_lm))

    batch: T.let = T.cast(n_b, "int32")
    heads: T.let = T.cast(n_h, "int32")
    key_heads: T.let = T.cast(n_g, "int32")
    value_heads: T.let = T.cast(n_e, "int32")
    q_len: T.let = T.cast(n_q, "int32")
    kv_len: T.let = T.cast(n_k, "int32")
    q_blocks: T.let = T.ceildiv(q_len, BLOCK_Q)
    if K_NORM:
        key_norms = T.alloc_buffer((n_b * n_g, T.max(n_k, 1)), "float32")
        norm_all_keys(key_norms, k, batch, key_heads, kv_len)
    if CODED:
        key_codes = T.alloc_buffer((n_b * n_g, T.max(n_k, 1), 4 * WORDS), "int8")
        key_steps = T.alloc_buffer((n_b * n_g, T.max(n_k, 1)), "float32")
        key_sums = T.alloc_buffer((n_b * n_g, T.max(n_k, 1)), "int32")
        if KEY_MEAN:
            key_means = T.alloc_buffer((n_b * n_g, D), "float32")
        code_all_keys(key_codes, key_steps, key_sums, key_means, k, batch, key_heads, kv_len)
    if MATCHES:
        chunks: T.let = T.ceildiv(kv_len, CHUNK)
        if MATCH_HEADS:
            match_heads: T.let = heads
        else:
            match_heads: T.let = 1
        key_spans = T.alloc_buffer((n_b * match_heads * T.max(chunks, 1), MATCHES, 2), "int32")
        match_all_keys(key_spans, batch, match_heads, chunks, q_len, kv_len, operands)
    for i_item in T.parallel(batch * heads * q_blocks):
        i_bh: T.let = T.truncdiv(i_item, q_blocks)  # nothing is negative here, and TVM is slow to see it of `//`
        i_b: T.let = T.truncdiv(i_bh, heads)
        i_h: T.let = T.truncmod(i_bh, heads)
        i_kh: T.let = T.truncdiv(i_h * key_heads, heads)
        i_vh: T.let = T.truncdiv(i_h * value_heads, heads)
        turn: T.let = T.truncmod(i_item, q_blocks)
        if GROWS:  # later queries see more keys: one of the last after one of the first, so that threads get equal shares
            i_m: T.let = T.Select(turn % 2 == 0, turn // 2, q_blocks - 1 - turn // 2)
        else:
            i_m: T.let = turn
        row_first: T.let = i_m * BLOCK_Q
        rows: T.let = T.min(q_len - row_first, BLOCK_Q)
        if OFFSET:
            q_first: T.let = row_first + query_offset(q_len, kv_len)
        else:
            q_first: T.let = row_first
        q_last: T.let = q_first + rows - 1

        q_t = T.alloc_buffer((D, BLOCK_Q), "float32")
        s_t = T.alloc_buffer((BLOCK_K, BLOCK_Q), "float32")
        o_t = T.alloc_buffer((E, BLOCK_Q), "float32")
        top = T.alloc_buffer((BLOCK_Q,), "float32")
        total = T.alloc_buffer((BLOCK_Q,), "float32")
        decay = T.alloc_buffer((BLOCK_Q,), "float32")
        if STAGED:
            if not CODED:
                k_s = T.alloc_buffer((BLOCK_K, D), "float32")
            v_s = T.alloc_buffer((BLOCK_K, E), "float32")
        if HELD_ANY:
            held = T.alloc_buffer((HELD, BLOCK_Q), "float32")
            held_whole = T.alloc_buffer((HELD_WHOLE, BLOCK_Q), "int32")
            hold_rows(held, held_whole, i_b, i_h, q_first, row_first, q_len, kv_len, operands)
        if TILES_ANY:
            tiles = T.alloc_buffer((TILES, BLOCK_K, BLOCK_Q), "float32")
            tiles_whole = T.alloc_buffer((TILES_WHOLE, BLOCK_K, BLOCK_Q), "int32")
        if PIECES_ANY:
            pieces = T.alloc_buffer((PIECES, BLOCK_Q), "float32")
            pieces_whole = T.alloc_buffer((PIECES_WHOLE, BLOCK_Q), "int32")

        read_queries(q_t, q, i_b, i_h, row_first, q_len)
        if NORMS:
            norm_queries(q_t, i_h, i_kh, operands)
        if CODED:
            codes_t = T.alloc_buffer((WORDS, BLOCK_Q), "int32")
            steps = T.alloc_buffer((BLOCK_Q,), "float32")
            if SHIFTED:
                shifts = T.alloc_buffer((BLOCK_Q,), "float32")
            code_queries(codes_t, steps, shifts, q_t, key_means, i_b * key_heads + i_kh, row_first, q_len)
        for e in range(E):
            for x in T.unroll(VECTORS):
                for j in T.vectorized(LANES):
                    o_t[e, x * LANES + j] = T.float32(0)
        for x in T.unroll(VECTORS):
            for j in T.vectorized(LANES):
                top[x * LANES + j] = T.float32("-inf")
                total[x * LANES + j] = T.float32(0)

        @T.inline
        def scores(k_first, n_first, stop, edge, high):
            """The scores of KEYS keys from k_first + n_first on; high: the largest of each query."""
            tile = T.alloc_buffer((KEYS, BLOCK_Q), "float32")
            if CODED:
                coded_scores(
                    tile, codes_t, steps, shifts, key_codes, key_steps, key_sums, i_b * key_heads + i_kh, k_first + n_first, stop
                )
            else:
                for i in T.unroll(KEYS):
                    for x in T.unroll(VECTORS):
                        for j in T.vectorized(LANES):
                            tile[i, x * LANES + j] = T.float32(0)
                for d in range(D):
                    for i in T.unroll(KEYS):
                        for x in T.unroll(VECTORS):
                            for j in T.vectorized(LANES):
                                if STAGED:
                                    tile[i, x * LANES + j] += k_s[n_first + i, d] * q_t[d, x * LANES + j]
                                else:
                                    tile[i, x * LANES + j] += (
                                        k[i_b, i_kh, T.min(k_first + n_first + i, stop - 1), d] * q_t[d, x * LANES + j]
                                    )
            for i in T.unroll(KEYS):
                position: T.let = T.min(k_first + n_first + i, stop - 1)
                for x in T.unroll(VECTORS):
                    for j in T.vectorized(LANES):
                        if K_NORM:
                            tile[i, x * LANES + j] *= key_norms[i_b * key_heads + i_kh, position]
                        if SCORES:
                            tile[i, x * LANES + j] = score_mod(
                                tile[i, x * LANES + j] * T.float32(SCALE),
                                i_b, i_h, q_first + x * LANES + j, row_first + x * LANES + j, position, q_len, kv_len,
                                operands, held_values,
                            )  # fmt: skip
                        if edge:
                            if MASK:
                                tile[i, x * LANES + j] = T.Select(
                                    (k_first + n_first + i < stop)
                                    & mask_mod(
                                        i_b, i_h, q_first + x * LANES + j, row_first + x * LANES + j, position, q_len, kv_len,
                                        operands, held_values,
                                    ),
                                    tile[i, x * LANES + j],
                                    T.float32("-inf"),
                                )  # fmt: skip
                            else:
                                tile[i, x * LANES + j] = T.Select(
                                    k_first + n_first + i < stop, tile[i, x * LANES + j], T.float32("-inf")
                                )
                        elif INNER_MASK:
                            tile[i, x * LANES + j] = T.Select(
                                inner_mask_mod(
                                    i_b, i_h, q_first + x * LANES + j, row_first + x * LANES + j, position, q_len, kv_len,
                                    operands, held_values,
                                ),
                                tile[i, x * LANES + j],
                                T.float32("-inf"),
                            )  # fmt: skip
                    for j in T.vectorized(LANES):
                        s_t[n_first + i, x * LANES + j] = tile[i, x * LANES + j]
                        high[x * LANES + j] = T.max(high[x * LANES + j], tile[i, x * LANES + j])

        @T.inline
        def weights(keys, high):
            """Scores become weights below the new top; what was summed before decays to it."""
            sum_t = T.alloc_buffer((BLOCK_Q,), "float32")
            for x in T.unroll(VECTORS):
                for j in T.vectorized(LANES):
                    new: T.let = T.max(top[x * LANES + j], high[x * LANES + j])
                    # Queries that have seen nothing yet: 2^(-inf - 0) is 0, -inf - -inf would be NaN.
                    high[x * LANES + j] = T.Select(new == T.float32("-inf"), T.float32(0), new)
                    fall: T.let = (top[x * LANES + j] - high[x * LANES + j]) * T.float32(UNIT)
                    decay[x * LANES + j] = softmax_weight(fall)
                    top[x * LANES + j] = new
                    sum_t[x * LANES + j] = total[x * LANES + j] * decay[x * LANES + j]
            for n in range(keys):
                for x in T.unroll(VECTORS):
                    for j in T.vectorized(LANES):
                        # The difference comes first: the largest score weighs 1 exactly, however large it is.
                        power: T.let = (s_t[n, x * LANES + j] - high[x * LANES + j]) * T.float32(UNIT)
                        weight: T.let = softmax_weight(power)
                        s_t[n, x * LANES + j] = weight
                        sum_t[x * LANES + j] += weight
            for x in T.unroll(VECTORS):
                for j in T.vectorized(LANES):
                    total[x * LANES + j] = sum_t[x * LANES + j]

        @T.inline
        def values(k_first, keys, e_first, channels):
            """The weighted sums of some channels of the values."""
            tile = T.alloc_buffer((channels, BLOCK_Q), "float32")
            for i in T.unroll(channels):
                for x in T.unroll(VECTORS):
                    for j in T.vectorized(LANES):
                        tile[i, x * LANES + j] = o_t[e_first + i, x * LANES + j] * decay[x * LANES + j]
            for n in range(keys):
                for i in T.unroll(channels):
                    for x in T.unroll(VECTORS):
                        for j in T.vectorized(LANES):
                            if STAGED:
                                tile[i, x * LANES + j] += v_s[n, e_first + i] * s_t[n, x * LANES + j]
                            else:
                                tile[i, x * LANES + j] += v[i_b, i_vh, k_first + n, e_first + i] * s_t[n, x * LANES + j]
            for i in T.unroll(channels):
                for x in T.unroll(VECTORS):
                    for j in T.vectorized(LANES):
                        o_t[e_first + i, x * LANES + j] = tile[i, x * LANES + j]

        @T.inline
        def all_values(k_first, keys):
            for i_tile in range(E // CHANNELS):
                values(k_first, keys, i_tile * CHANNELS, CHANNELS)
            if CHANNELS_REST:
                values(k_first, keys, E - CHANNELS_REST, CHANNELS_REST)

        @T.inline
        def walk(start, stop, edge):
            """The keys start … stop - 1, by blocks of BLOCK_K; edge: the mask decides of each."""
            for i_n in range(T.ceildiv(stop - start, BLOCK_K)):
                k_first: T.let = start + i_n * BLOCK_K
                keys: T.let = T.min(stop - k_first, BLOCK_K)
                if STAGED:
                    for n in range(keys):
                        if not CODED:
                            for d in range(D):
                                k_s[n, d] = T.cast(k[i_b, i_kh, k_first + n, d], "float32")
                        for e in range(E):
                            v_s[n, e] = T.cast(v[i_b, i_vh, k_first + n, e], "float32")
                if TILES_ANY:
                    hold_tile(tiles, tiles_whole, i_b, i_h, q_first, row_first, k_first, keys, q_len, kv_len, operands)
                if PIECES_ANY:
                    hold_piece(pieces, pieces_whole, i_b, i_h, q_first, row_first, k_first, q_len, kv_len, operands)
                high = T.alloc_buffer((BLOCK_Q,), "float32")
                for x in T.unroll(VECTORS):
                    for j in T.vectorized(LANES):
                        high[x * LANES + j] = T.float32("-inf")
                for i_tile in range(T.ceildiv(keys, KEYS)):
                    scores(k_first, i_tile * KEYS, stop, edge, high)
                if SKIPS:
                    near = T.alloc_buffer((1,), "int32")
                    near[0] = 0
                    for j in range(BLOCK_Q):  # of a query that sees none of these keys the difference is -inf, or no number
                        near[0] = near[0] | T.cast(
                            (high[j] - T.max(top[j], high[j])) * T.float32(TOP) > T.float32(-SKIP), "int32"
                        )
                    weights(keys, high)
                    if near[0] != 0:
                        all_values(k_first, keys)
                else:
                    weights(keys, high)
                    all_values(k_first, keys)

        # Bounds stand in buffers, because TVM is slow to see through chains of min and max.
        seen = T.alloc_buffer((4,), "int32")
        if RANGE:
            seen[0] = between(0, first_key(q_first, q_last, q_len, kv_len), kv_len)
            seen[3] = between(seen[0], end_key(q_first, q_last, q_len, kv_len), kv_len)
            seen[1] = between(seen[0], inner_first_key(q_first, q_last, q_len, kv_len), seen[3])
            seen[2] = between(seen[1], inner_end_key(q_first, q_last, q_len, kv_len), seen[3])
        else:
            seen[0] = 0
            seen[1] = 0
            seen[2] = kv_len
            seen[3] = kv_len
        if VISITS:
            if MATCHES:
                spans = T.alloc_buffer((MATCHES, 2), "int32")
                match_queries(spans, i_b, i_h, q_first, row_first, q_len, kv_len, operands)
                first_piece: T.let = (i_b * match_heads + T.truncmod(i_h, match_heads)) * chunks
            if LEADING:
                led: T.let = T.min(leading_keys(q_len, kv_len), seen[0])
                first_chunk: T.let = 0
                end_chunk: T.let = T.truncdiv(T.max(seen[3], led) + CHUNK - 1, CHUNK)
            else:
                first_chunk: T.let = T.truncdiv(seen[0], CHUNK)
                end_chunk: T.let = T.truncdiv(seen[3] + CHUNK - 1, CHUNK)
            for i_c in range(first_chunk, end_chunk):
                if LEADING:  # of a piece between the leading keys and the range nothing is left; one that has both is read whole
                    start: T.let = T.Select(i_c * CHUNK < led, i_c * CHUNK, T.max(i_c * CHUNK, seen[0]))
                    stop: T.let = T.min(i_c * CHUNK + CHUNK, T.Select(i_c * CHUNK + CHUNK > seen[0], seen[3], led))
                else:
                    start: T.let = T.max(i_c * CHUNK, seen[0])
                    stop: T.let = T.min(i_c * CHUNK + CHUNK, seen[3])
                if LISTED:
                    chosen: T.let = is_chosen(i_b, i_h, row_first, row_first + rows - 1, i_c * CHUNK, operands)
                if MATCHES:
                    matching: T.let = may_match(spans, key_spans, first_piece + i_c)
                if LISTED and MATCHES:
                    visited: T.let = chosen & matching
                elif LISTED:
                    visited: T.let = chosen
                else:
                    visited: T.let = matching
                if visited & (start < stop):
                    if WHOLE:
                        inside: T.let = (start >= seen[1]) & (stop <= seen[2]) & (T.truncmod(stop - start, KEYS) == 0)
                        if MATCHES:
                            plain: T.let = inside & all_match(spans, key_spans, first_piece + i_c)
                        else:
                            plain: T.let = inside
                        if plain:
                            walk(start, stop, False)
                        else:
                            walk(start, stop, True)
                    else:
                        walk(start, stop, True)
        else:
            if PHASES == 0:  # what all queries see, in whole tiles; the rest is at the edge
                seen[2] = seen[1] + T.truncdiv(seen[2] - seen[1], KEYS) * KEYS
                walk(seen[1], seen[2], False)
            else:
                seen[2] = seen[1]
            edges = T.alloc_buffer((3, 2), "int32")
            edges[0, 0] = seen[2]
            edges[0, 1] = seen[3]
            edges[1, 0] = seen[0]
            edges[1, 1] = seen[1]
            if LEADING:
                edges[2, 0] = 0
                edges[2, 1] = T.min(leading_keys(q_len, kv_len), seen[0])
            for i_edge in range(EDGES):
                walk(edges[i_edge, 0], edges[i_edge, 1], True)

        if SINK:
            for x in T.unroll(VECTORS):
                for j in T.vectorized(LANES):
                    logit: T.let = sink_logit(
                        i_b, i_h, q_first + x * LANES + j, row_first + x * LANES + j, q_len, kv_len, operands, held_values
                    )
                    sink: T.let = logit * T.float32(1 / TOP)
                    new: T.let = T.max(top[x * LANES + j], sink)
                    safe: T.let = T.Select(new == T.float32("-inf"), T.float32(0), new)
                    fall: T.let = (top[x * LANES + j] - safe) * T.float32(UNIT)
                    rise: T.let = (sink - safe) * T.float32(UNIT)
                    decay[x * LANES + j] = softmax_weight(fall)
                    total[x * LANES + j] = total[x * LANES + j] * decay[x * LANES + j] + softmax_weight(rise)
                    top[x * LANES + j] = safe
        for x in T.unroll(VECTORS):
            for j in T.vectorized(LANES):
                if EMPTY_ROWS:
                    share: T.let = T.float32(1) / T.Select(
                        total[x * LANES + j] == T.float32(0), T.float32(1), total[x * LANES + j]
                    )
                else:
                    share: T.let = T.float32(1) / total[x * LANES + j]
                if SINK:
                    decay[x * LANES + j] *= share
                else:
                    decay[x * LANES + j] = share
        write_rows(o, o_t, decay, i_b, i_h, row_first, rows)
        if LSE:
            for j in range(rows):
                lse[i_b, i_h, row_first + j] = top[j] * T.float32(TOP) + T.log(total[j])
        if MEAN_OF_EMPTY:
            average_empty(o, v, total, i_b, i_h, i_vh, row_first, rows, kv_len)
