"""How prefill.py reads a block of queries and writes what became of it: in memory channels stand side by side, in registers queries.

    q [rows, D]  ->  q_t [D, BLOCK_Q]        o_t [E, BLOCK_Q] * factor [BLOCK_Q]  ->  o [rows, E]

square    LANES rows of LANES numbers, which stay in registers: turning it takes log2(LANES) exchanges of halves between pairs of rows.
          One number at a time, reading and writing took as long as half of a block of keys
rest      channels that fill no square are moved one by one
"""

from tvm.script import tirx as T

from attnopt.codegen.tvm.kernels.prefill_holes import (
    BLOCK_Q, D, DTYPE, D_REST, D_SQUARES, E, E_REST, E_SQUARES, LANES, LANES_OVER_4, LANES_OVER_8, VECTORS,
)  # fmt: skip


def earlier(x, y, step):
    """Lane i: that of x where bit `step` of i is 0, else lane i - step of y."""
    return T.Shuffle([x, y], [i + (LANES - step) * (i & step > 0) for i in range(LANES)])


def later(x, y, step):
    """Lane i: lane i + step of x where bit `step` of i is 0, else that of y."""
    return T.Shuffle([x, y], [i + (LANES if i & step > 0 else step) for i in range(LANES)])


@T.inline
def exchange(square, step):
    """Rows i and i + step trade the lanes in which they differ from their transposes by bit `step`."""
    for i in T.unroll(LANES // (2 * step)):
        for j in T.unroll(step):
            x: T.let = square[2 * step * i + j, T.Ramp(0, 1, LANES)]
            y: T.let = square[2 * step * i + step + j, T.Ramp(0, 1, LANES)]
            square[2 * step * i + j, T.Ramp(0, 1, LANES)] = earlier(x, y, step)
            square[2 * step * i + step + j, T.Ramp(0, 1, LANES)] = later(x, y, step)


@T.inline
def transpose(square):
    """square[i, j] becomes square[j, i]."""
    exchange(square, 1)
    exchange(square, 2)
    if LANES_OVER_4:
        exchange(square, 4)
    if LANES_OVER_8:
        exchange(square, 8)


@T.inline
def read_queries(q_t, q, b, h, row_first, q_len):
    """Lanes past the last query repeat it."""
    if D_SQUARES:
        for x in range(VECTORS):
            for s in range(D_SQUARES):
                square = T.alloc_buffer((LANES, LANES), "float32")
                for i in T.unroll(LANES):
                    for j in T.vectorized(LANES):
                        square[i, j] = T.cast(q[b, h, T.min(row_first + x * LANES + i, q_len - 1), s * LANES + j], "float32")
                transpose(square)
                for i in T.unroll(LANES):
                    for j in T.vectorized(LANES):
                        q_t[s * LANES + i, x * LANES + j] = square[i, j]
    if D_REST:
        for j in range(BLOCK_Q):
            for d in range(D_REST):
                q_t[D - D_REST + d, j] = T.cast(q[b, h, T.min(row_first + j, q_len - 1), D - D_REST + d], "float32")


@T.inline
def write_rows(o, o_t, factor, b, h, row_first, rows):
    """The first `rows` of the block's queries."""
    if E_SQUARES:
        for x in range(VECTORS):
            for s in range(E_SQUARES):
                square = T.alloc_buffer((LANES, LANES), "float32")
                for i in T.unroll(LANES):
                    for j in T.vectorized(LANES):
                        square[i, j] = o_t[s * LANES + i, x * LANES + j] * factor[x * LANES + j]
                transpose(square)
                for i in T.unroll(LANES):
                    if x * LANES + i < rows:
                        for j in T.vectorized(LANES):
                            o[b, h, row_first + x * LANES + i, s * LANES + j] = T.cast(square[i, j], DTYPE)
    if E_REST:
        for j in range(rows):
            for e in range(E_REST):
                o[b, h, row_first + j, E - E_REST + e] = T.cast(o_t[E - E_REST + e, j] * factor[j], DTYPE)


@T.inline
def average_empty(o, v, total, b, h, v_head, row_first, rows, kv_len):
    """Queries that saw no key get the mean of all values."""
    empty = T.alloc_buffer((1,), "int32")
    empty[0] = 0
    for j in range(rows):
        if total[j] == T.float32(0):
            empty[0] += 1
    if empty[0] > 0:
        mean = T.alloc_buffer((E,), "float32")
        for e in range(E):
            mean[e] = T.float32(0)
        for n in range(kv_len):
            for e in range(E):
                mean[e] += T.cast(v[b, v_head, n, e], "float32")
        for j in range(rows):
            if total[j] == T.float32(0):
                for e in range(E):
                    o[b, h, row_first + j, e] = T.cast(mean[e] / T.cast(kv_len, "float32"), DTYPE)
