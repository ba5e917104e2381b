"""The number that a code of a cache stands for: of keys or of values, for which this file stands in an emitted one under their names.

    x = (code + zero) * step                SIDE_STEPS, side_number …   ->   K_STEPS, key_number …  and  V_STEPS, value_number …

    steps    "token": one for all channels of a token, applied to scores and weights, so that codes are only converted
             "channel": one for all tokens, applied to the queries and to the output
             "group" (of channels of a token) and "block" (a channel of a group of tokens): applied as the codes are read
             "balanced": one for a token, applied to weights, and a factor of each channel of a group of tokens, SCALES here, as read
    narrow   codes of 4 and 2 bits: byte j of a row holds channel j in its lowest bits, then SIDE_STORED + j, 2 SIDE_STORED + j, …

Source: "KIVI" (keys by channel in groups of tokens, values by token in groups of channels).
"""

from tvm.script import tirx as T

from attnopt.codegen.tvm.kernels.decode_cached import from_fp8, part_of, real

SIDE_STORED = 16
SIDE_FORMAT = "float"
SIDE_NARROW = False
SIDE_BITS = 8
SIDE_STEPS = "none"
SIDE_GROUP = 16
SIDE_ZEROS = False
SIDE_LEVEL = 0.0


def side_code(X, place, head, row, c, lane):
    """The code of channel c + lane of a token; c is a multiple of the lanes of a vector."""
    if SIDE_NARROW:
        return part_of(X[place, head, row, c % SIDE_STORED + lane], c // SIDE_STORED, SIDE_BITS)
    elif SIDE_FORMAT == "fp8":
        return from_fp8(X[place, head, row, c + lane])
    else:
        return real(X[place, head, row, c + lane])


def side_number(X, SCALES, POINTS, place, head, row, c, lane):
    """Channel c + lane of a token, but for steps that are applied elsewhere."""
    code = side_code(X, place, head, row, c, lane)
    if SIDE_STEPS == "group":
        if SIDE_ZEROS:
            code = code + (real(POINTS[place, head, row, c // SIDE_GROUP]) + T.float32(SIDE_LEVEL))
        elif SIDE_LEVEL:
            code = code + T.float32(SIDE_LEVEL)
        return code * real(SCALES[place, head, row, c // SIDE_GROUP])
    elif SIDE_STEPS == "block":
        if SIDE_ZEROS:
            code = code + (real(POINTS[place, head, T.truncdiv(row, SIDE_GROUP), c + lane]) + T.float32(SIDE_LEVEL))
        elif SIDE_LEVEL:
            code = code + T.float32(SIDE_LEVEL)
        return code * real(SCALES[place, head, T.truncdiv(row, SIDE_GROUP), c + lane])
    elif SIDE_STEPS == "balanced":
        point = real(POINTS[place, head, row, 0]) + T.float32(SIDE_LEVEL)
        return (code + point) * SCALES[place, head, T.truncdiv(row, SIDE_GROUP), c + lane]
    else:
        return code
