"""Functions of real numbers that a CPU computes in vectors: LLVM would call one of the C library for each lane.

    2^x = 2^n * 2^f,  n whole, |f| <= 1/2        2^f is a polynomial of degree 5 that is 1 at 0; n is added to its exponent

The relative error of exp2 is below 2e-7; the others are made of it. Results are inf and 0 where float32 ends.
"""

from tvm.script import tirx as T

LOG2E = 1.4426950408889634
ROUNDING = 12582912.0  # 1.5 * 2^23: added to a number of float32, it leaves what is whole of it in the last bits


def softmax_weight(x):
    """2^x for x up to 0, and 0 below 2^-100: sums of what is less would be numbers of few bits, at each of which a CPU stops."""
    return exp2_inside(T.Select(x < T.float32(-100.0), T.float32(-127.0), x))  # NaN is not less, and stays


def exp2(x):
    return exp2_inside(T.max(T.float32(-127.0), T.min(T.float32(128.0), x)))  # NaN comes second, and stays


def exp2_inside(x):  # from -127, which has no bits of its own and comes out as 0, to 128, which comes out as inf
    n = T.reinterpret("int32", x + T.float32(ROUNDING))
    f = x - (T.reinterpret("float32", n) - T.float32(ROUNDING))
    p = T.float32(0.0013264720366333027) * f + T.float32(0.009671513022334603)
    p = p * f + T.float32(0.05550733777650721)
    p = p * f + T.float32(0.2402224207698363)
    p = p * f + T.float32(0.6931469775578203)
    p = p * f + T.float32(1.0)
    return T.reinterpret("float32", T.reinterpret("int32", p) + T.shift_left(n, T.int32(23)))


def exp(x):
    return exp2(x * T.float32(LOG2E))


def tanh(x):
    """1 - 2 / (exp(2 x) + 1), which is right at both ends."""
    return T.float32(1.0) - T.float32(2.0) / (exp2(x * T.float32(2.0 * LOG2E)) + T.float32(1.0))


def sigmoid(x):
    return T.float32(1.0) / (exp2(x * T.float32(-LOG2E)) + T.float32(1.0))
