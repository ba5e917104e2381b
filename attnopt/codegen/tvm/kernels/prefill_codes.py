"""Scores of queries and keys in eight bits, for prefill.py: products of whole numbers, four channels of a vector of queries at once.

    s = (code of q) (code of k)' * step of q * step of k  [+ q (mean of keys)']        code = round((x - mean) / step)

    key_codes [batch * key heads, keys, 4 * WORDS] int8, key_steps and key_sums [.., keys]: made once, before queries are looked at
    codes_t   [WORDS, BLOCK_Q] int32: four codes of queries to a word, each plus 128, as that side of the product has no sign; the sum of
              128 * code of k, where each product begins, takes it out again
    step      max|x - mean| / 127 over the rows of equal group; those of a group lie in one block of KEY_ROWS keys, or BLOCK_Q queries
    shifts    q (mean of keys)', which changes no weight: only where scores are more than compared with each other

Source: "SageAttention2".
"""

from tvm.script import tirx as T

from attnopt.codegen.tvm.kernels.byte_products import multiplied
from attnopt.codegen.tvm.kernels.prefill_holes import BLOCK_Q, D, KEYS, LANES, VECTORS

CODED = False
WORDS = 4
KEY_ROWS = 64
KEY_MEAN = False
KEY_GROUPS = False  # keys share a step
QUERY_GROUPS = False
SHIFTED = False


def query_group(row):
    """Which queries of a block share a step: those of equal number."""
    return row


def key_group(k):
    """Which keys of a block share a step."""
    return k


def step_of(peak):
    """What a code of 1 stands for."""
    return T.Select(peak == T.float32(0), T.float32(1), peak / T.float32(127))


@T.inline
def mean_of_keys(key_means, k, b, g, row, kv_len):
    """key_means[row, d]: over all keys of a head."""
    for d in range(D):
        key_means[row, d] = T.float32(0)
    for n in range(kv_len):
        for d in range(D):
            key_means[row, d] += T.cast(k[b, g, n, d], "float32")
    for d in range(D):
        key_means[row, d] = key_means[row, d] / T.cast(kv_len, "float32")


@T.inline
def code_keys(key_codes, key_steps, key_sums, key_means, k, b, g, row, start, count):
    """Codes, steps and sums of `count` keys from `start` on."""
    part = T.alloc_buffer((D,), "float32")
    peaks = T.alloc_buffer((KEY_ROWS,), "float32")
    found = T.alloc_buffer((1,), "float32")
    whole = T.alloc_buffer((1,), "int32")
    for n in range(count):
        found[0] = T.float32(0)
        for d in range(D):
            if KEY_MEAN:
                found[0] = T.max(found[0], T.abs(T.cast(k[b, g, start + n, d], "float32") - key_means[row, d]))
            else:
                found[0] = T.max(found[0], T.abs(T.cast(k[b, g, start + n, d], "float32")))
        peaks[n] = found[0]
    for n in range(count):
        found[0] = peaks[n]
        if KEY_GROUPS:
            for m in range(count):
                found[0] = T.max(found[0], T.Select(key_group(start + m) == key_group(start + n), peaks[m], T.float32(0)))
        key_steps[row, start + n] = step_of(found[0])
        for d in range(D):
            if KEY_MEAN:
                part[d] = (T.cast(k[b, g, start + n, d], "float32") - key_means[row, d]) / step_of(found[0])
            else:
                part[d] = T.cast(k[b, g, start + n, d], "float32") / step_of(found[0])
        whole[0] = 0
        for d in range(D):
            key_codes[row, start + n, d] = T.cast(T.nearbyint(part[d]), "int8")
            whole[0] += T.cast(T.nearbyint(part[d]), "int32")
        for d in range(4 * WORDS - D):
            key_codes[row, start + n, D + d] = T.int8(0)
        key_sums[row, start + n] = -128 * whole[0]


@T.inline
def code_queries(codes_t, steps, shifts, q_t, key_means, row, row_first, q_len):
    """Codes and steps of a block of queries."""
    peaks = T.alloc_buffer((BLOCK_Q,), "float32")
    for x in T.unroll(VECTORS):
        for j in T.vectorized(LANES):
            peaks[x * LANES + j] = T.float32(0)
    for d in range(D):
        for x in T.unroll(VECTORS):
            for j in T.vectorized(LANES):
                peaks[x * LANES + j] = T.max(peaks[x * LANES + j], T.abs(q_t[d, x * LANES + j]))
    if SHIFTED:
        for x in T.unroll(VECTORS):
            for j in T.vectorized(LANES):
                shifts[x * LANES + j] = T.float32(0)
        for d in range(D):
            for x in T.unroll(VECTORS):
                for j in T.vectorized(LANES):
                    shifts[x * LANES + j] += q_t[d, x * LANES + j] * key_means[row, d]
    for j in range(BLOCK_Q):
        steps[j] = peaks[j]
        if QUERY_GROUPS:
            for i in range(T.min(q_len - row_first, BLOCK_Q)):
                steps[j] = T.max(
                    steps[j],
                    T.Select(
                        query_group(row_first + i) == query_group(T.min(row_first + j, q_len - 1)), peaks[i], T.float32(0)
                    ),
                )
    for x in T.unroll(VECTORS):
        for j in T.vectorized(LANES):
            steps[x * LANES + j] = step_of(steps[x * LANES + j])
    for w in range(WORDS):
        for x in T.unroll(VECTORS):
            for j in T.vectorized(LANES):
                codes_t[w, x * LANES + j] = -2139062144  # 128 in each byte
    for d in range(D):
        for x in T.unroll(VECTORS):
            for j in T.vectorized(LANES):
                codes_t[d // 4, x * LANES + j] = codes_t[d // 4, x * LANES + j] + T.shift_left(
                    T.cast(T.nearbyint(q_t[d, x * LANES + j] / steps[x * LANES + j]), "int32"), T.cast(d % 4 * 8, "int32")
                )


@T.inline
def coded_scores(tile, codes_t, steps, shifts, key_codes, key_steps, key_sums, row, first, stop):
    """The scores of KEYS keys from `first` on, before the terms of the spec."""
    sums = T.alloc_buffer((KEYS * VECTORS, LANES), "int32", scope="local")
    for i in T.unroll(KEYS):
        for x in T.unroll(VECTORS):
            sums[i * VECTORS + x, T.Ramp(0, 1, LANES)] = T.Broadcast(key_sums[row, T.min(first + i, stop - 1)], LANES)
    for w in range(WORDS):
        for i in T.unroll(KEYS):
            for x in T.unroll(VECTORS):
                sums[i * VECTORS + x, T.Ramp(0, 1, LANES)] = multiplied(
                    sums[i * VECTORS + x, T.Ramp(0, 1, LANES)],
                    codes_t[w, T.Ramp(x * LANES, 1, LANES)],
                    T.reinterpret("int32", key_codes[row, T.min(first + i, stop - 1), T.Ramp(4 * w, 1, 4)]),
                    LANES,
                )
    for i in T.unroll(KEYS):
        for x in T.unroll(VECTORS):
            for j in T.vectorized(LANES):
                tile[i, x * LANES + j] = (
                    T.cast(sums[i * VECTORS + x, j], "float32") * key_steps[row, T.min(first + i, stop - 1)]
                ) * steps[x * LANES + j]
                if SHIFTED:
                    tile[i, x * LANES + j] += shifts[x * LANES + j]
