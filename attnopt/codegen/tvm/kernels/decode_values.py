"""Weighted sums of values, for ROWS rows of a decode kernel."""

from tvm.script import tirx as T

from attnopt.codegen.tvm.kernels.decode_cached import BLOCK, E_LANES, fetch, place_of, real, row_of
from attnopt.codegen.tvm.kernels.decode_side import (
    SIDE_LEVEL as V_LEVEL, SIDE_STEPS as V_STEPS, SIDE_ZEROS as V_ZEROS, side_number as value_number,
)  # fmt: skip
from attnopt.codegen.tvm.kernels.decode_scores import ROWS, E

E_PARTS = 1
AHEAD = False
K_LINES = 1
K_LINE = 16
V_LINES = 1
V_LINE = 16


@T.inline
def value_tile(S, PARTS, V, V_SCALES, V_POINTS, K, PAGES, task, b, head, k_head, r, first, count, kv_len, part, ahead):
    """PARTS of rows r + i, channels of part `part`: plus weights times values of `count` tokens."""
    sums = T.alloc_buffer((ROWS * E_PARTS, E_LANES), "float32", scope="local")
    for i in T.unroll(ROWS):
        for e in T.unroll(E_PARTS):
            for lane in T.vectorized(E_LANES):
                sums[i * E_PARTS + e, lane] = PARTS[task, r + i, (part * E_PARTS + e) * E_LANES + lane]
    for j in range(count):
        place: T.let = place_of(PAGES, b, first + j)
        if AHEAD:
            if ahead:
                if part == 0:
                    fetch(K, PAGES, 1, K_LINES, K_LINE, b, k_head, first + BLOCK + j, kv_len)
        for e in T.unroll(E_PARTS):
            x = T.alloc_buffer((E_LANES,), "float32", scope="local")
            for lane in T.vectorized(E_LANES):
                x[lane] = value_number(
                    V, V_SCALES, V_POINTS, place, head, row_of(first + j), (part * E_PARTS + e) * E_LANES, lane
                )
            for i in T.unroll(ROWS):
                for lane in T.vectorized(E_LANES):
                    sums[i * E_PARTS + e, lane] += S[i, j] * x[lane]
    for i in T.unroll(ROWS):
        for e in T.unroll(E_PARTS):
            for lane in T.vectorized(E_LANES):
                PARTS[task, r + i, (part * E_PARTS + e) * E_LANES + lane] = sums[i * E_PARTS + e, lane]


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
