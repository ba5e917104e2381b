"""Scores of int8 and int4 keys by integer products, exact up to one rounding of the query, which is no coarser than float32's own sums.

    q_d = unit * (65536 x_d + 256 y_d + z_d) with x, y, z int8        q c' = unit * (65536 x c' + 256 y c' + z c')

unit = max|q| / (127 * 65536), so three digits round a query at 2^-24 of its largest channel; the products are sums of 32 bits, without a
rounding. Queries of 16 bits take two digits (2^-16), which is finer than their own last place there.
An instruction multiplies four channels, bytes of a word, of as many keys as a vector has words: WORDS keys x WORDS words are read as
they stand and transposed. int8 codes are read as code + 128, because that side of the product has no sign.

    DIGITS [groups, rows, K_DIGITS, D / 4] int32: four channels to a word       UNITS [groups, rows] float32
"""

from tvm.script import tirx as T

from attnopt.codegen.tvm.kernels.decode_cached import place_of, real, row_of
from attnopt.codegen.tvm.kernels.decode_side import SIDE_STORED as D_STORED, SIDE_FORMAT as K_FORMAT
from attnopt.codegen.tvm.kernels.decode_lanes import vector
from attnopt.codegen.tvm.kernels.decode_rows import D
from attnopt.codegen.tvm.kernels.decode_scores import ROWS

WORDS = 16
WORDS_OVER_4 = True
WORDS_OVER_8 = True
K_DIGITS = 3
LARGEST = 8323072.0
PRODUCT = "llvm.x86.avx512.vpdpbusd.512"


def multiplied(total, codes, digits):
    """total + the products of four unsigned codes with four signed digits in each lane."""
    unsigned = T.reinterpret(f"int8x{4 * WORDS}", codes)
    signed = T.reinterpret(f"int8x{4 * WORDS}", T.Broadcast(digits, WORDS))
    return T.call_llvm_pure_intrin(f"int32x{WORDS}", PRODUCT, total, unsigned, signed)


def bits(x):
    """The same word in all lanes."""
    return T.Broadcast(T.int32(x), WORDS)


@T.inline
def row_as_digits(DIGITS, UNITS, QUERIES, group, r):
    """The digits of row r, four channels to a word, the lowest byte first; QUERIES becomes what they stand for."""
    most: T.float32 = T.float32(0)
    total: T.float32 = T.float32(0)
    for d in range(D):
        most = T.max(most, T.abs(QUERIES[group, r, d]))
        total = total + QUERIES[group, r, d]
    UNITS[group, r] = T.Select(T.isnan(total), total, most / T.float32(LARGEST))  # a maximum may pass over what is no number
    inverse: T.float32 = T.if_then_else(most > T.float32(0), T.float32(LARGEST) / most, T.float32(0))
    for word in range(D // 4):
        for digit in T.unroll(K_DIGITS):
            DIGITS[group, r, digit, word] = 0
        for byte in T.unroll(4):
            left: T.int32 = T.cast(T.nearbyint(QUERIES[group, r, 4 * word + byte] * inverse), "int32")
            QUERIES[group, r, 4 * word + byte] = real(left) * UNITS[group, r]
            for turn in T.unroll(K_DIGITS):
                low: T.int32 = T.bitwise_and(left + 128, 255) - 128
                DIGITS[group, r, K_DIGITS - 1 - turn, word] = T.bitwise_or(
                    DIGITS[group, r, K_DIGITS - 1 - turn, word], T.shift_left(T.bitwise_and(low, 255), 8 * byte)
                )
                left = T.shift_right(left - low, 8)


@T.inline
def exchanged(codes, step):
    """In each square of 2 x 2 blocks of `step` words, the two off the diagonal change places."""
    for i in T.unroll(WORDS // 2):
        both = T.alloc_buffer((2, WORDS), "int32", scope="local")
        both[0, vector(0, WORDS)] = codes[i // step * 2 * step + i % step, vector(0, WORDS)]
        both[1, vector(0, WORDS)] = codes[i // step * 2 * step + i % step + step, vector(0, WORDS)]
        codes[i // step * 2 * step + i % step, vector(0, WORDS)] = T.Shuffle(
            [both[0, vector(0, WORDS)], both[1, vector(0, WORDS)]],
            [WORDS + (lane ^ step) if lane & step else lane for lane in range(WORDS)],
        )
        codes[i // step * 2 * step + i % step + step, vector(0, WORDS)] = T.Shuffle(
            [both[0, vector(0, WORDS)], both[1, vector(0, WORDS)]],
            [WORDS + lane if lane & step else lane ^ step for lane in range(WORDS)],
        )


@T.inline
def digit_tile(S, DIGITS, UNITS, K, PAGES, group, b, head, r, first, j, kv_len):
    """S[i, j + lane]: the products of rows r + i with the keys first + j + lane."""
    sums = T.alloc_buffer((ROWS * K_DIGITS, WORDS), "int32", scope="local")
    codes = T.alloc_buffer((WORDS, WORDS), "int32", scope="local")
    for i in T.unroll(ROWS * K_DIGITS):
        sums[i, vector(0, WORDS)] = bits(0)
    for part in T.unroll(D_STORED // (4 * WORDS)):
        for key in T.unroll(WORDS):
            at: T.let = T.min(first + j + key, kv_len - 1)
            place: T.let = place_of(PAGES, b, at)
            codes[key, vector(0, WORDS)] = T.reinterpret(
                f"int32x{WORDS}", K[place, head, row_of(at), vector(part * 4 * WORDS, 4 * WORDS)]
            )
        exchanged(codes, 1)
        exchanged(codes, 2)
        if WORDS_OVER_4:
            exchanged(codes, 4)
        if WORDS_OVER_8:
            exchanged(codes, 8)
        for word in T.unroll(WORDS):
            if K_FORMAT == "int4":
                low: T.let = T.bitwise_and(codes[word, vector(0, WORDS)], bits(0x0F0F0F0F))
                high: T.let = T.bitwise_and(T.shift_right(codes[word, vector(0, WORDS)], bits(4)), bits(0x0F0F0F0F))
                for i in T.unroll(ROWS):
                    for digit in T.unroll(K_DIGITS):
                        sums[i * K_DIGITS + digit, vector(0, WORDS)] = multiplied(
                            multiplied(
                                sums[i * K_DIGITS + digit, vector(0, WORDS)],
                                low,
                                DIGITS[group, r + i, digit, part * WORDS + word],
                            ),
                            high,
                            DIGITS[group, r + i, digit, D // 8 + part * WORDS + word],
                        )
            else:
                positive: T.let = T.bitwise_xor(codes[word, vector(0, WORDS)], bits(-2139062144))  # each byte plus 128
                for i in T.unroll(ROWS):
                    for digit in T.unroll(K_DIGITS):
                        sums[i * K_DIGITS + digit, vector(0, WORDS)] = multiplied(
                            sums[i * K_DIGITS + digit, vector(0, WORDS)],
                            positive,
                            DIGITS[group, r + i, digit, part * WORDS + word],
                        )
    for i in T.unroll(ROWS):
        for lane in T.vectorized(WORDS):
            if K_DIGITS == 3:
                S[i, j + lane] = (
                    (real(sums[i * 3, lane]) * T.float32(256) + real(sums[i * 3 + 1, lane])) * T.float32(256)
                    + real(sums[i * 3 + 2, lane])
                ) * UNITS[group, r + i]  # fmt: skip
            else:
                S[i, j + lane] = (real(sums[i * 2, lane]) * T.float32(256) + real(sums[i * 2 + 1, lane])) * UNITS[group, r + i]
