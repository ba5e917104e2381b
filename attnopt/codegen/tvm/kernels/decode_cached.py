"""How decode.py reads a cache: where a token stands, and codes as float32. decode_side.py makes numbers of them.

pages    token n stands in page PAGES[b, n // PAGE] at n % PAGE
"""

from tvm.script import tirx as T

D_LANES = 16
E_LANES = 16
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


def part_of(byte, part, bits):
    """Of the codes of so many bits in a byte one, as float32; part 0 has the lowest bits."""
    return real(T.bitwise_and(T.shift_right(T.cast(byte, "int32"), T.cast(bits * part, "int32")), 2**bits - 1))


def from_fp8(x):
    """E4M3 under the exponent of float16: sign, exponent and digits keep their order, and a power of two moves the exponent."""
    bits = T.cast(T.reinterpret("uint8", x), "uint16")
    sign = T.shift_left(T.bitwise_and(bits, T.uint16(128)), T.uint16(8))
    rest = T.shift_left(T.bitwise_and(bits, T.uint16(127)), T.uint16(7))
    return real(T.reinterpret("float16", T.bitwise_or(sign, rest))) * T.float32(256.0)


@T.inline
def fetch(X, PAGES, count, lines, step, b, head, first, kv_len):
    """Ask for `count` rows, of lines of `step` elements each, to be in the second-level cache when they are read."""
    for i in T.unroll(count):
        at: T.let = T.min(first + i, kv_len - 1)
        place: T.let = place_of(PAGES, b, at)
        for line in T.unroll(lines):
            T.evaluate(
                T.call_llvm_intrin(
                    "void", "llvm.prefetch.p0", T.address_of(X[place, head, row_of(at), line * step]),
                    T.int32(0), T.int32(2), T.int32(1),
                )
            )  # fmt: skip


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
