"""Attention of many queries on a GPU, by the simplest schedule: a thread holds one query, the threads of a block share keys and values.

    grid      (blocks of BLOCK_Q queries, heads, batch), of BLOCK_Q threads each
    walk      BLOCK_K keys and values at a time are copied to shared memory by all threads; then each thread makes the scores of its
              query (s), their largest, and adds to the weighted sum of values (row_o), which it rescales once for each step
    ranges    keys before first_key and from end_key on, which no query of the block sees, are not read; the mask decides of the rest
    names     i_ index of a block, s_ stride, n_ size, p_ argument   row_q [D], row_o [E], s [BLOCK_K] of a thread   k_s, v_s shared

No tensor cores, no copies in flight: Triton's kernels are what GPUs should run; this one shows the same spec in CUDA.
"""

from tvm.script import tirx as T

from attnopt.codegen.tvm.kernels.prefill_holes import (
    BLOCK_K, BLOCK_Q, D, DTYPE, E, LEADING, LSE, MASK, MEAN_OF_EMPTY, OFFSET, RANGE, SCALE, SCORES, SINK,
)  # fmt: skip
from attnopt.codegen.tvm.kernels.sight import (
    between, end_key, first_key, held_values, leading_keys, mask_mod, match_operands, operands, query_offset, score_mod, sink_logit,
)  # fmt: skip


def exp(x):
    return T.exp(x)


def exp2(x):
    return T.exp2(x)


def tanh(x):
    return T.tanh(x)


def sigmoid(x):
    return T.float32(1) / (T.float32(1) + T.exp(-x))


@T.prim_func(s_tir=True)
def attention(p_q: T.handle, p_k: T.handle, p_v: T.handle, given: T.handle, p_o: T.handle, p_lse: T.handle):
    T.func_attr({"global_symbol": "attention", "tirx.noalias": True})
    n_b, n_h, n_g, n_e, n_q, n_k = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
    s_qb, s_qh, s_qm, s_kb, s_kh, s_kn = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
    s_vb, s_vh, s_vn = T.int64(), T.int64(), T.int64()
    q = T.match_buffer(p_q, (n_b, n_h, n_q, D), DTYPE, strides=(s_qb, s_qh, s_qm, 1))
    k = T.match_buffer(p_k, (n_b, n_g, n_k, D), DTYPE, strides=(s_kb, s_kh, s_kn, 1))
    v = T.match_buffer(p_v, (n_b, n_e, n_k, E), DTYPE, strides=(s_vb, s_vh, s_vn, 1))
    match_operands()
    o = T.match_buffer(p_o, (n_b, n_h, n_q, E), DTYPE)
    if LSE:
        lse = T.match_buffer(p_lse, (n_b, n_h, n_q), "float32")

    for i_b in T.thread_binding(T.cast(n_b, "int32"), thread="blockIdx.z"):
        for i_h in T.thread_binding(T.cast(n_h, "int32"), thread="blockIdx.y"):
            for i_m in T.thread_binding(T.ceildiv(T.cast(n_q, "int32"), BLOCK_Q), thread="blockIdx.x"):
                for i_thread in T.thread_binding(BLOCK_Q, thread="threadIdx.x"):
                    q_len: T.let = T.cast(n_q, "int32")
                    kv_len: T.let = T.cast(n_k, "int32")
                    i_kh: T.let = T.truncdiv(i_h * T.cast(n_g, "int32"), T.cast(n_h, "int32"))
                    i_vh: T.let = T.truncdiv(i_h * T.cast(n_e, "int32"), T.cast(n_h, "int32"))
                    row_first: T.let = i_m * BLOCK_Q
                    row: T.let = T.min(
                        row_first + i_thread, q_len - 1
                    )  # threads past the last query repeat it, and store nothing
                    if OFFSET:
                        position: T.let = query_offset(q_len, kv_len)
                    else:
                        position: T.let = 0
                    q_first: T.let = row_first + position
                    q_last: T.let = T.min(row_first + BLOCK_Q, q_len) - 1 + position
                    k_s = T.alloc_buffer((BLOCK_K, D), "float32", scope="shared")
                    v_s = T.alloc_buffer((BLOCK_K, E), "float32", scope="shared")
                    row_q = T.alloc_buffer((D,), "float32", scope="local")
                    row_o = T.alloc_buffer((E,), "float32", scope="local")
                    s = T.alloc_buffer((BLOCK_K,), "float32", scope="local")
                    top = T.alloc_buffer((1,), "float32", scope="local")
                    total = T.alloc_buffer((1,), "float32", scope="local")
                    high = T.alloc_buffer((1,), "float32", scope="local")
                    decay = T.alloc_buffer((1,), "float32", scope="local")
                    for d in range(D):
                        row_q[d] = T.cast(q[i_b, i_h, row, d], "float32") * T.float32(SCALE)
                    for e in range(E):
                        row_o[e] = T.float32(0)
                    top[0] = T.float32("-inf")
                    total[0] = T.float32(0)

                    @T.inline
                    def walk(start, stop):
                        """The keys start … stop - 1, by blocks of BLOCK_K."""
                        for i_n in range(T.ceildiv(stop - start, BLOCK_K)):
                            T.tvm_storage_sync("shared")
                            for x in range(T.ceildiv(BLOCK_K * D, BLOCK_Q)):
                                if x * BLOCK_Q + i_thread < BLOCK_K * D:
                                    n: T.let = (x * BLOCK_Q + i_thread) // D
                                    k_s[n, (x * BLOCK_Q + i_thread) % D] = T.cast(
                                        k[i_b, i_kh, T.min(start + i_n * BLOCK_K + n, stop - 1), (x * BLOCK_Q + i_thread) % D],
                                        "float32",
                                    )
                            for x in range(T.ceildiv(BLOCK_K * E, BLOCK_Q)):
                                if x * BLOCK_Q + i_thread < BLOCK_K * E:
                                    n: T.let = (x * BLOCK_Q + i_thread) // E
                                    v_s[n, (x * BLOCK_Q + i_thread) % E] = T.cast(
                                        v[i_b, i_vh, T.min(start + i_n * BLOCK_K + n, stop - 1), (x * BLOCK_Q + i_thread) % E],
                                        "float32",
                                    )
                            T.tvm_storage_sync("shared")
                            high[0] = top[0]
                            for n in range(BLOCK_K):
                                key: T.let = T.min(start + i_n * BLOCK_K + n, stop - 1)
                                s[n] = T.float32(0)
                                for d in range(D):
                                    s[n] += row_q[d] * k_s[n, d]
                                if SCORES:
                                    s[n] = score_mod(
                                        s[n], i_b, i_h, row + position, row, key, q_len, kv_len, operands, held_values
                                    )
                                if MASK:
                                    s[n] = T.if_then_else(
                                        (start + i_n * BLOCK_K + n < stop)
                                        & mask_mod(i_b, i_h, row + position, row, key, q_len, kv_len, operands, held_values),
                                        s[n],
                                        T.float32("-inf"),
                                    )
                                else:
                                    s[n] = T.if_then_else(start + i_n * BLOCK_K + n < stop, s[n], T.float32("-inf"))
                                high[0] = T.max(high[0], s[n])
                            if high[0] > T.float32("-inf"):
                                decay[0] = T.exp(top[0] - high[0])
                                top[0] = high[0]
                                total[0] = total[0] * decay[0]
                                for e in range(E):
                                    row_o[e] = row_o[e] * decay[0]
                                for n in range(BLOCK_K):
                                    s[n] = T.exp(s[n] - high[0])
                                    total[0] += s[n]
                                for n in range(BLOCK_K):
                                    for e in range(E):
                                        row_o[e] += s[n] * v_s[n, e]

                    if RANGE:
                        first: T.let = between(0, first_key(q_first, q_last, q_len, kv_len), kv_len)
                        walk(first, between(first, end_key(q_first, q_last, q_len, kv_len), kv_len))
                        if LEADING:
                            walk(0, T.min(T.min(leading_keys(q_len, kv_len), kv_len), first))
                    else:
                        walk(0, kv_len)
                    if SINK:
                        high[0] = T.max(top[0], sink_logit(i_b, i_h, row + position, row, q_len, kv_len, operands, held_values))
                        decay[0] = T.exp(top[0] - high[0])
                        total[0] = total[0] * decay[0] + T.exp(
                            sink_logit(i_b, i_h, row + position, row, q_len, kv_len, operands, held_values) - high[0]
                        )
                        top[0] = high[0]
                        for e in range(E):
                            row_o[e] = row_o[e] * decay[0]
                    if MEAN_OF_EMPTY:
                        if total[0] == T.float32(0):
                            for n in range(kv_len):
                                for e in range(E):
                                    row_o[e] += T.cast(v[i_b, i_vh, n, e], "float32")
                            total[0] = T.cast(kv_len, "float32")
                    if row_first + i_thread < q_len:
                        for e in range(E):
                            o[i_b, i_h, row, e] = T.cast(
                                row_o[e] / T.if_then_else(total[0] == T.float32(0), T.float32(1), total[0]), DTYPE
                            )
                        if LSE:
                            lse[i_b, i_h, row] = T.if_then_else(
                                top[0] == T.float32("-inf"), T.float32("-inf"), top[0] + T.log(total[0])
                            )
