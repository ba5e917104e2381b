"""Queries and keys of norm one, for prefill.py: the query is multiplied by all that belongs to channels, the score by what is left.

    rms(q) * q_gain . rms(k) * k_gain   ->   inverse_norm(k) * ((q * inverse_norm(q) * q_gain * k_gain) . k)

So keys go to the product as they stand in memory. Their norms are computed once, before: key_norms [batch * key heads, keys]. A mean
that is subtracted from keys is subtracted from the query instead, after its gains: q . (k - mean k) = (q - mean q) . k
"""

from tvm.script import tirx as T

from attnopt.codegen.tvm.kernels.prefill_holes import BLOCK_K, BLOCK_Q, CENTERED, D, EPS, GAINS, K_NORM, LANES, NORM, Q_NORM, VECTORS


def channel_factor(h, key_head, d, operands):
    """The gains of a channel."""
    return T.float32(1)


def inverse_norm(square):
    """What makes the norm of a row 1, from the sum of its squares: its root mean square, or its length."""
    if NORM == "rms":
        return T.float32(1) / T.sqrt(square * T.float32(1 / D) + T.float32(EPS))
    else:
        return T.float32(1) / T.max(T.sqrt(square), T.float32(EPS))


@T.inline
def centre(q_t, part):
    """Each query less its mean over the channels."""
    for x in T.unroll(VECTORS):
        for j in T.vectorized(LANES):
            part[x * LANES + j] = T.float32(0)
    for d in range(D):
        for x in T.unroll(VECTORS):
            for j in T.vectorized(LANES):
                part[x * LANES + j] += q_t[d, x * LANES + j]
    for d in range(D):
        for x in T.unroll(VECTORS):
            for j in T.vectorized(LANES):
                q_t[d, x * LANES + j] -= part[x * LANES + j] * T.float32(1 / D)


@T.inline
def norm_queries(q_t, h, key_head, operands):
    """q_t [D, BLOCK_Q] normalised and multiplied by the gains of both sides."""
    part = T.alloc_buffer((BLOCK_Q,), "float32")
    if Q_NORM:
        if CENTERED:
            centre(q_t, part)
        for x in T.unroll(VECTORS):
            for j in T.vectorized(LANES):
                part[x * LANES + j] = T.float32(0)
        for d in range(D):
            for x in T.unroll(VECTORS):
                for j in T.vectorized(LANES):
                    part[x * LANES + j] += q_t[d, x * LANES + j] * q_t[d, x * LANES + j]
        for x in T.unroll(VECTORS):
            for j in T.vectorized(LANES):
                part[x * LANES + j] = inverse_norm(part[x * LANES + j])
        for d in range(D):
            for x in T.unroll(VECTORS):
                for j in T.vectorized(LANES):
                    q_t[d, x * LANES + j] *= part[x * LANES + j]
    if GAINS:
        for d in range(D):
            for x in T.unroll(VECTORS):
                for j in T.vectorized(LANES):
                    q_t[d, x * LANES + j] *= channel_factor(h, key_head, d, operands)
    if CENTERED and K_NORM:
        centre(q_t, part)


@T.inline
def norm_of_key(norms, k, b, g, n, row):
    """What makes the norm of a key 1, for norms[row, n]; the vectors run along its channels."""
    part = T.alloc_buffer((LANES,), "float32")
    found = T.alloc_buffer((2,), "float32")  # the mean, and the sum of squares
    found[0] = T.float32(0)
    found[1] = T.float32(0)
    if CENTERED:
        for d in range(D):
            found[0] += T.cast(k[b, g, n, d], "float32") * T.float32(1 / D)
    for j in T.vectorized(LANES):
        part[j] = T.float32(0)
    for c in range(D // LANES):
        for j in T.vectorized(LANES):
            part[j] += (T.cast(k[b, g, n, c * LANES + j], "float32") - found[0]) * (
                T.cast(k[b, g, n, c * LANES + j], "float32") - found[0]
            )
    for j in T.unroll(LANES):
        found[1] += part[j]
    for d in range(D % LANES):
        found[1] += (T.cast(k[b, g, n, D // LANES * LANES + d], "float32") - found[0]) * (
            T.cast(k[b, g, n, D // LANES * LANES + d], "float32") - found[0]
        )
    norms[row, n] = inverse_norm(found[1])


@T.inline
def norm_all_keys(norms, k, batch, key_heads, kv_len):
    """Blocks of BLOCK_K keys, in parallel."""
    for i_item in T.parallel(batch * key_heads * T.ceildiv(kv_len, BLOCK_K)):
        row: T.let = T.truncdiv(i_item, T.ceildiv(kv_len, BLOCK_K))
        start: T.let = T.truncmod(i_item, T.ceildiv(kv_len, BLOCK_K)) * BLOCK_K
        for n in range(T.min(kv_len - start, BLOCK_K)):
            norm_of_key(norms, k, T.truncdiv(row, key_heads), T.truncmod(row, key_heads), start + n, row)
