"""How decode.py reads a cache: where a token stands, and the number that a code stands for.

    x = (code + zero) * step

    steps    "token": one for all channels of a token, applied to scores and weights, so that codes are only converted
             "channel": one for all tokens, applied to the queries and to the output
             "group" (of channels of a token) and "block" (a channel of a group of tokens): applied as the codes are read
    int4     byte j of a row holds channel j in its low half and channel D_STORED + j in its high half
    pages    token n stands in page PAGES[b, n // PAGE] at n % PAGE

Source: "KIVI" (keys by channel in groups of tokens, values by token in groups of channels).
"""

from tvm.script import tirx as T

D_LANES = 16
D_STORED = 16
K_FORMAT = "float"
K_STEPS = "none"
K_GROUP = 16
K_ZEROS = False
K_LEVEL = 0.0
E_LANES = 16
E_STORED = 16
V_FORMAT = "float"
V_STEPS = "none"
V_GROUP = 16
V_ZEROS = False
V_LEVEL = 0.0
PAGED = False
PAGE = 16
BLOCK = 128


def real(x):
    return T.cast(x, "float32")


def place_of(PAGES, b, at):
    """The page of a token, or its sequence."""
    if PAGED:
        return T.cast(PAGES[b, T.truncdiv(at, PAGE)], "int64")
    else:
        return b


def row_of(at):
    """The row of a token in its page, or in its sequence."""
    if PAGED:
        return T.truncmod(at, PAGE)
    else:
        return at


def nibble(byte, high):
    """The low or the high half of a byte, as float32."""
    return real(T.bitwise_and(T.shift_right(T.cast(byte, "int32"), T.cast(4 * high, "int32")), 15))


def from_fp8(x):
    """E4M3 under the exponent of float16: sign, exponent and digits keep their order, and a power of two moves the exponent."""
    bits = T.cast(T.reinterpret("uint8", x), "uint16")
    sign = T.shift_left(T.bitwise_and(bits, T.uint16(128)), T.uint16(8))
    rest = T.shift_left(T.bitwise_and(bits, T.uint16(127)), T.uint16(7))
    return real(T.reinterpret("float16", T.bitwise_or(sign, rest))) * T.float32(256.0)


def key_code(K, place, head, row, c, lane):
    """The code of channel c + lane of a key; c is a multiple of D_LANES."""
    if K_FORMAT == "int4":
        return nibble(K[place, head, row, c % D_STORED + lane], c // D_STORED)
    elif K_FORMAT == "fp8":
        return from_fp8(K[place, head, row, c + lane])
    else:
        return real(K[place, head, row, c + lane])


def key_number(K, K_SCALES, K_POINTS, place, head, row, c, lane):
    """Channel c + lane of a key, but for steps that are applied elsewhere."""
    code = key_code(K, place, head, row, c, lane)
    if K_STEPS == "group":
        if K_ZEROS:
            code = code + (real(K_POINTS[place, head, row, c // K_GROUP]) + T.float32(K_LEVEL))
        elif K_LEVEL:
            code = code + T.float32(K_LEVEL)
        return code * real(K_SCALES[place, head, row, c // K_GROUP])
    elif K_STEPS == "block":
        if K_ZEROS:
            code = code + (real(K_POINTS[place, head, T.truncdiv(row, K_GROUP), c + lane]) + T.float32(K_LEVEL))
        elif K_LEVEL:
            code = code + T.float32(K_LEVEL)
        return code * real(K_SCALES[place, head, T.truncdiv(row, K_GROUP), c + lane])
    else:
        return code


def value_code(V, place, head, row, c, lane):
    """The code of channel c + lane of a value; c is a multiple of E_LANES."""
    if V_FORMAT == "int4":
        return nibble(V[place, head, row, c % E_STORED + lane], c // E_STORED)
    elif V_FORMAT == "fp8":
        return from_fp8(V[place, head, row, c + lane])
    else:
        return real(V[place, head, row, c + lane])


def value_number(V, V_SCALES, V_POINTS, place, head, row, c, lane):
    """Channel c + lane of a value, but for steps that are applied elsewhere."""
    code = value_code(V, place, head, row, c, lane)
    if V_STEPS == "group":
        if V_ZEROS:
            code = code + (real(V_POINTS[place, head, row, c // V_GROUP]) + T.float32(V_LEVEL))
        elif V_LEVEL:
            code = code + T.float32(V_LEVEL)
        return code * real(V_SCALES[place, head, row, c // V_GROUP])
    elif V_STEPS == "block":
        if V_ZEROS:
            code = code + (real(V_POINTS[place, head, T.truncdiv(row, V_GROUP), c + lane]) + T.float32(V_LEVEL))
        elif V_LEVEL:
            code = code + T.float32(V_LEVEL)
        return code * real(V_SCALES[place, head, T.truncdiv(row, V_GROUP), c + lane])
    else:
        return code


@T.inline
def of_tokens(X, SCALES, PAGES, b, head, first, kv_len, more):
    """X[j]: the step or zero point of token first + j, plus `more`; past the end that of the last."""
    if first + BLOCK <= kv_len:
        for j in range(BLOCK):
            X[j] = real(SCALES[place_of(PAGES, b, first + j), head, row_of(first + j), 0]) + T.float32(more)
    else:
        for j in range(BLOCK):
            at: T.let = T.min(first + j, kv_len - 1)
            X[j] = real(SCALES[place_of(PAGES, b, at), head, row_of(at), 0]) + T.float32(more)
