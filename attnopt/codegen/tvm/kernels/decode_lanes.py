"""Lanes of vectors and whole numbers, for the decode family: a vector of a buffer, sums across lanes, quotients.

paired   two vectors become one that holds the sums of their pairs of lanes: after log2(n) steps n vectors are one, whose lane i
         is the sum of all lanes of vector i
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


def whole(a, b):
    """a // b of numbers that are not negative: without the correction of signs, which TVM writes out where it cannot prove it away."""
    return T.truncdiv(a, b)


def rest(a, b):
    """a % b of numbers that are not negative."""
    return T.truncmod(a, b)


def unrolled(count):
    """A loop that is written out unless it is long."""
    return T.unroll(count) if count <= 16 else T.serial(count)
