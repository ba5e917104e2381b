"""Scores of one block of keys and their weights, for ROWS rows of a decode kernel.

score_tile   products of ROWS rows with KEYS keys, as sums over vectors of channels; each sum has a register until its lanes meet
adjusted     with the steps and zero points of tokens        visible_scores   with the terms of the spec, -inf where hidden
weights      relative to the largest score so far
"""

from tvm.script import tirx as T

from attnopt.codegen.tvm.kernels.decode_cached import BLOCK, D_LANES, E_LANES, place_of, row_of
from attnopt.codegen.tvm.kernels.decode_side import (
    SIDE_LEVEL as K_LEVEL, SIDE_STEPS as K_STEPS, SIDE_ZEROS as K_ZEROS, SIDE_LEVEL as V_LEVEL, SIDE_ZEROS as V_ZEROS,
    side_number as key_number,
)  # fmt: skip
from attnopt.codegen.tvm.kernels.decode_lanes import across, plus, rest, unrolled, vector, whole
from attnopt.codegen.tvm.kernels.decode_rows import D
from attnopt.codegen.tvm.kernels.sight import held_values, inner_mask_mod, mask_mod, score_mod
from attnopt.codegen.tvm.kernels.vectors import softmax_weight

E = 16
ROWS = 4
KEYS = 4
LANES = 16
PIECE = 4
FOLDED = True
UNIT = 1.0
SCORES = False
GATHERS = False
MASK = False
INNER_MASK = False
K_SHIFTS = False
V_SHIFTS = False
V_WEIGHED = False


def lanes(count):
    """A vector, or one after the other where an operand is read for each key."""
    if GATHERS:
        return T.serial(count)
    else:
        return T.vectorized(count)


@T.inline
def folded(sums):
    """sums[i // D_LANES, i % D_LANES]: the sum over the lanes of sums[i]."""


@T.inline
def score_tile(S, QUERIES, K, K_SCALES, K_POINTS, PAGES, group, b, head, r, first, j, kv_len):
    """S[i, j + key]: the products of rows r + i with the keys first + j + key."""
    sums = T.alloc_buffer((ROWS * KEYS, D_LANES), "float32", scope="local")
    for i in T.unroll(ROWS * KEYS):
        for lane in T.vectorized(D_LANES):
            sums[i, lane] = T.float32(0)
    for d in unrolled(D // D_LANES):
        for key in T.unroll(KEYS):
            at: T.let = T.min(first + j + key, kv_len - 1)
            place: T.let = place_of(PAGES, b, at)
            x = T.alloc_buffer((D_LANES,), "float32", scope="local")
            for lane in T.vectorized(D_LANES):
                x[lane] = key_number(K, K_SCALES, K_POINTS, place, head, row_of(at), d * D_LANES, lane)
            for i in T.unroll(ROWS):
                for lane in T.vectorized(D_LANES):
                    sums[i * KEYS + key, lane] += QUERIES[group, r + i, d * D_LANES + lane] * x[lane]
    if FOLDED:
        folded(sums)
    for i in T.unroll(ROWS * KEYS // PIECE):
        S[i * PIECE // KEYS, vector(j + i * PIECE % KEYS, PIECE)] = sums[i * PIECE // D_LANES, vector(i * PIECE % D_LANES, PIECE)]


@T.inline
def adjusted(S, SHIFTS, K_STEP, K_ZERO, group, r):
    """Scores after what steps and zero points add to them."""
    for i in range(ROWS):
        for c in range(BLOCK // LANES):
            for lane in T.vectorized(LANES):
                if K_STEPS == "token":
                    if K_ZEROS:
                        S[i, c * LANES + lane] = (
                            S[i, c * LANES + lane] + SHIFTS[group, r + i] * K_ZERO[c * LANES + lane]
                        ) * K_STEP[c * LANES + lane]
                    elif K_SHIFTS:
                        S[i, c * LANES + lane] = (S[i, c * LANES + lane] + SHIFTS[group, r + i] * T.float32(K_LEVEL)) * K_STEP[
                            c * LANES + lane
                        ]
                    else:
                        S[i, c * LANES + lane] = S[i, c * LANES + lane] * K_STEP[c * LANES + lane]
                else:
                    S[i, c * LANES + lane] = S[i, c * LANES + lane] + SHIFTS[group, r + i]


@T.inline
def visible_scores(S, b, g, ratio, rows, r, first, inner, offset, q_len, kv_len, operands):
    """Scores after the terms of the spec, minus infinity where a row does not see a key."""
    for i in range(ROWS):
        h: T.int64 = g * ratio + rest(T.min(r + i, rows - 1), ratio)
        row: T.int64 = whole(T.min(r + i, rows - 1), ratio)
        q: T.int64 = row + offset
        if SCORES:
            for c in range(BLOCK // LANES):
                for lane in lanes(LANES):
                    S[i, c * LANES + lane] = score_mod(
                        S[i, c * LANES + lane],
                        b,
                        h,
                        q,
                        row,
                        T.min(first + c * LANES + lane, kv_len - 1),
                        q_len,
                        kv_len,
                        operands,
                        held_values,
                    )
        if not inner:
            if MASK:
                for c in range(BLOCK // LANES):
                    for lane in lanes(LANES):
                        S[i, c * LANES + lane] = T.Select(
                            mask_mod(
                                b, h, q, row, T.min(first + c * LANES + lane, kv_len - 1), q_len, kv_len, operands, held_values
                            ),
                            S[i, c * LANES + lane],
                            T.float32("-inf"),
                        )
            for j in range(T.min(kv_len - first, BLOCK), BLOCK):
                S[i, j] = T.float32("-inf")
        elif INNER_MASK:
            for c in range(BLOCK // LANES):
                for lane in lanes(LANES):
                    S[i, c * LANES + lane] = T.Select(
                        inner_mask_mod(b, h, q, row, first + c * LANES + lane, q_len, kv_len, operands, held_values),
                        S[i, c * LANES + lane],
                        T.float32("-inf"),
                    )


@T.inline
def weights(S, TOPS, SUMS, V_SHIFTED, PARTS, V_STEP, V_ZERO, task, r):
    """Scores as weights relative to the largest score so far; what was found before is made relative to that too."""
    for i in range(ROWS):
        top = T.alloc_buffer((LANES,), "float32", scope="local")
        total = T.alloc_buffer((LANES,), "float32", scope="local")
        decay = T.alloc_buffer((LANES,), "float32", scope="local")
        for lane in T.vectorized(LANES):
            top[lane] = TOPS[task, r + i]
        for c in range(BLOCK // LANES):
            for lane in T.vectorized(LANES):
                top[lane] = T.max(top[lane], S[i, c * LANES + lane])
        top[vector(0, LANES)] = across(T.max, top[vector(0, LANES)], LANES)
        # Rows that have seen nothing yet: exp2(-inf - 0) is 0, -inf - -inf would be NaN.
        safe: T.float32 = T.if_then_else(top[0] == T.float32("-inf"), T.float32(0), top[0])
        for lane in T.vectorized(LANES):
            decay[lane] = softmax_weight((TOPS[task, r + i] - safe) * T.float32(UNIT))
            total[lane] = T.float32(0)
        TOPS[task, r + i] = top[0]
        for c in range(BLOCK // LANES):
            for lane in T.vectorized(LANES):
                S[i, c * LANES + lane] = softmax_weight((S[i, c * LANES + lane] - safe) * T.float32(UNIT))
            for lane in T.vectorized(LANES):
                total[lane] += S[i, c * LANES + lane]
        total[vector(0, LANES)] = across(plus, total[vector(0, LANES)], LANES)
        SUMS[task, r + i] = SUMS[task, r + i] * decay[0] + total[0]
        if V_WEIGHED:
            if V_SHIFTS:
                for lane in T.vectorized(LANES):
                    total[lane] = T.float32(0)
            for c in range(BLOCK // LANES):
                for lane in T.vectorized(LANES):
                    S[i, c * LANES + lane] = S[i, c * LANES + lane] * V_STEP[c * LANES + lane]
                if V_SHIFTS:
                    for lane in T.vectorized(LANES):
                        if V_ZEROS:
                            total[lane] += S[i, c * LANES + lane] * V_ZERO[c * LANES + lane]
                        else:
                            total[lane] += S[i, c * LANES + lane] * T.float32(V_LEVEL)
            if V_SHIFTS:
                total[vector(0, LANES)] = across(plus, total[vector(0, LANES)], LANES)
                V_SHIFTED[task, r + i] = V_SHIFTED[task, r + i] * decay[0] + total[0]
        for e in unrolled(E // E_LANES):
            for lane in T.vectorized(E_LANES):
                PARTS[task, r + i, e * E_LANES + lane] = PARTS[task, r + i, e * E_LANES + lane] * decay[0]
