"""Arithmetic on vectors for the decode family: lanes summed across, and powers of two without a call.

    folded   [n, n] -> [n]: lane i becomes the sum of the lanes of vector i, in log2(n) steps that halve the number of vectors
    exp2     2^x = 2^whole * 2^(x - whole), the second factor by a polynomial on [-1/2, 1/2] (relative error 2e-7)
"""

from tvm.script import tirx as T


def vector(start, count):
    """The elements start … start + count - 1 of a dimension."""
    return T.Ramp(start, 1, count) if count > 1 else start


def paired(x, y, step, lanes):
    """Lane i: the sum of lanes i and i ^ step, of x where bit `step` of i is 0 and of y where it is 1."""
    own = T.Shuffle([x, y], [i + lanes * (i & step > 0) for i in range(lanes)])
    return own + T.Shuffle([x, y], [(i ^ step) + lanes * (i & step > 0) for i in range(lanes)])


def plus(x, y):
    return x + y


def across(op, x, lanes):
    """All lanes: op over the lanes of x."""
    step = 1
    while step < lanes:
        x = op(x, T.Shuffle([x], [i ^ step for i in range(lanes)]))
        step *= 2
    return x


def exp2(x):
    """2^x; 0 from -126.5 down, minus infinity included."""
    x = T.max(x, T.float32(-127.0))
    whole = T.nearbyint(x)
    part = x - whole
    power = T.float32(0.0013276472190680217)
    for factor in (0.009675541616115627, 0.05550713275336048, 0.24022119718655216, 0.6931469670621023, 1.0):
        power = power * part + T.float32(factor)
    return power * T.reinterpret("float32", T.shift_left(T.cast(whole, "int32") + 127, 23))
