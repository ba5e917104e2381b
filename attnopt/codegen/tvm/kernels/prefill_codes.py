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


def less_mean(k, key_means, b, g, row, n, d):
    """A channel of a key, less its mean over all keys."""
    if KEY_MEAN:
        return T.cast(k[b, g, n, d], "float32") - key_means[row, d]
    else:
        return T.cast(k[b, g, n, d], "float32")


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
def shared_peaks(largest, peaks, groups):
    """largest [n]: the largest of the peaks [n] whose group is that of n; n is a multiple of LANES."""
    for x in range(largest.shape[0] // LANES):
        for j in T.vectorized(LANES):
            largest[x * LANES + j] = T.float32(0)
    for i in range(largest.shape[0]):
        for x in range(largest.shape[0] // LANES):
            for j in T.vectorized(LANES):
                same: T.let = T.Select(groups[i] == groups[x * LANES + j], peaks[i], T.float32(0))
                largest[x * LANES + j] = T.max(largest[x * LANES + j], same)


@T.inline
def code_keys(key_codes, key_steps, key_sums, key_means, k, b, g, row, start, count):
    """Codes, steps and sums of `count` keys from `start` on."""
    rest = T.alloc_buffer((4 * WORDS,), "float32")
    peaks = T.alloc_buffer((KEY_ROWS,), "float32")
    largest = T.alloc_buffer((KEY_ROWS,), "float32")
    whole = T.alloc_buffer((1,), "int32")
    for n in range(KEY_ROWS):
        peaks[n] = T.float32(0)
    for d in range(4 * WORDS - D):
        rest[D + d] = T.float32(0)
    for n in range(count):
        part = T.alloc_buffer((4,), "float32")
        for d in range(D):
            rest[d] = T.abs(less_mean(k, key_means, b, g, row, start + n, d))
        for j in T.vectorized(4):
            part[j] = T.float32(0)
        for w in range(WORDS):
            for j in T.vectorized(4):
                part[j] = T.max(part[j], rest[4 * w + j])
        peaks[n] = T.max(T.max(part[0], part[1]), T.max(part[2], part[3]))
    if KEY_GROUPS:
        groups = T.alloc_buffer((KEY_ROWS,), "int32")
        for n in range(KEY_ROWS):
            groups[n] = key_group(start + n)
        shared_peaks(largest, peaks, groups)
    else:
        for n in range(KEY_ROWS):
            largest[n] = peaks[n]
    for n in range(count):
        key_steps[row, start + n] = step_of(largest[n])
        for d in range(D):
            rest[d] = T.nearbyint(less_mean(k, key_means, b, g, row, start + n, d) / step_of(largest[n]))
        whole[0] = 0
        for d in range(4 * WORDS):
            key_codes[row, start + n, d] = T.cast(rest[d], "int8")
            whole[0] += T.cast(rest[d], "int32")
        key_sums[row, start + n] = -128 * whole[0]


@T.inline
def code_all_keys(key_codes, key_steps, key_sums, key_means, k, batch, key_heads, kv_len):
    """Means of heads, then blocks of KEY_ROWS keys, in parallel."""
    if KEY_MEAN:
        for i_row in T.parallel(batch * key_heads):
            mean_of_keys(key_means, k, T.truncdiv(i_row, key_heads), T.truncmod(i_row, key_heads), i_row, kv_len)
    for i_item in T.parallel(batch * key_heads * T.ceildiv(kv_len, KEY_ROWS)):
        row: T.let = T.truncdiv(i_item, T.ceildiv(kv_len, KEY_ROWS))
        start: T.let = T.truncmod(i_item, T.ceildiv(kv_len, KEY_ROWS)) * KEY_ROWS
        code_keys(
            key_codes, key_steps, key_sums, key_means, k, T.truncdiv(row, key_heads), T.truncmod(row, key_heads), row, start,
            T.min(kv_len - start, KEY_ROWS),
        )  # fmt: skip


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
    if QUERY_GROUPS:  # lanes past the last query repeat it, and its group
        groups = T.alloc_buffer((BLOCK_Q,), "int32")
        for j in range(BLOCK_Q):
            groups[j] = query_group(T.min(row_first + j, q_len - 1))
        shared_peaks(steps, peaks, groups)
    else:
        for x in T.unroll(VECTORS):
            for j in T.vectorized(LANES):
                steps[x * LANES + j] = peaks[x * LANES + j]
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
