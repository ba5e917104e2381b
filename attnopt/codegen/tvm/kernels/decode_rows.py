"""The rows of a decode kernel before the walk: as float32, with the scale, and what zero points add to each of their scores."""

from tvm.script import tirx as T

from attnopt.codegen.tvm.kernels.decode_cached import D_LANES, real
from attnopt.codegen.tvm.kernels.decode_side import SIDE_LEVEL as K_LEVEL, SIDE_STEPS as K_STEPS, SIDE_ZEROS as K_ZEROS
from attnopt.codegen.tvm.kernels.decode_lanes import rest, whole

D = 16
SCALE = 1.0


@T.inline
def row_as_float32(QUERIES, Q, K_SCALES, group, b, g, r, ratio, k_ratio, rows):
    """Row r with the scale, and with steps by channel; rows past the last repeat it."""
    h: T.int64 = g * ratio + rest(T.min(r, rows - 1), ratio)
    row: T.int64 = whole(T.min(r, rows - 1), ratio)
    for d in range(D // D_LANES):
        for lane in T.vectorized(D_LANES):
            QUERIES[group, r, d * D_LANES + lane] = real(Q[b, h, row, d * D_LANES + lane]) * T.float32(SCALE)
    if K_STEPS == "channel":
        for d in range(D):
            QUERIES[group, r, d] = QUERIES[group, r, d] * real(K_SCALES[b, whole(h, k_ratio), 0, d])


@T.inline
def shift_of_row(SHIFTS, QUERIES, K_POINTS, group, b, head, r):
    """What zero points add to each score of row r: the sum of its channels, times the zero points that all tokens share."""
    shift: T.float32 = T.float32(0)
    for d in range(D):
        if K_STEPS == "channel":
            if K_ZEROS:
                shift = shift + QUERIES[group, r, d] * (real(K_POINTS[b, head, 0, d]) + T.float32(K_LEVEL))
            else:
                shift = shift + QUERIES[group, r, d] * T.float32(K_LEVEL)
        else:
            shift = shift + QUERIES[group, r, d]
    SHIFTS[group, r] = shift
