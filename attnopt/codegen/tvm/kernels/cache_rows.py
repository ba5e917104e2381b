"""Round rows of keys or values to the codes of a cache, and write them behind those that are there.

    step = (high - low) / MOST        zero = round(low / step)        code = round(x / step) - zero, within 0 … MOST
    symmetric: step = max(|low|, |high|) / TOP, zero = -TOP

parallel  over key heads of sequences; a row is read twice, for the extremes of its groups of GROUP channels and for its codes
bytes     a byte holds PER_BYTE codes: of row parts of STORED channels the first is in its lowest bits; a whole one is less MIDDLE
BAD       counts the numbers that are not finite: what is written then is of no use
"""

from tvm.script import tirx as T

from attnopt.codegen.tvm.kernels.decode_lanes import rest, whole

D = 16
STORED = 16
GROUP = 16
GROUPS = 1
PER_BYTE = 1
BITS = 8
MOST = 255.0
TOP = 127.0
MIDDLE = 128.0
CLIP = 1.0
LARGEST = 3.4028234663852886e38
SYMMETRIC = False
CODE_DTYPE = "int8"
SCALE_DTYPE = "float32"
FINITE = 3.4028234663852886e38


def held(x):
    """As the scales are stored."""
    return T.cast(T.cast(T.max(T.min(x, T.float32(LARGEST)), T.float32(-LARGEST)), SCALE_DTYPE), "float32")


def safe(x):
    return T.Select(x == T.float32(0), T.float32(1), x)


def code(x, step, zero):
    return T.max(T.min(T.nearbyint(x / step) - zero, T.float32(MOST)), T.float32(0))


@T.prim_func(s_tir=True)
def attention(x: T.handle, codes: T.handle, scales: T.handle, zeros: T.handle, bad: T.handle, first: T.int64):
    T.func_attr({"global_symbol": "attention", "tirx.noalias": True})
    batch, heads, count, room = T.int64(), T.int64(), T.int64(), T.int64()
    s_xb, s_xh, s_xt = T.int64(), T.int64(), T.int64()
    s_cb, s_ch, s_ct = T.int64(), T.int64(), T.int64()
    s_sb, s_sh, s_st = T.int64(), T.int64(), T.int64()
    s_zb, s_zh, s_zt = T.int64(), T.int64(), T.int64()
    X = T.match_buffer(x, (batch, heads, count, D), "float32", strides=(s_xb, s_xh, s_xt, 1), align=1)
    CODES = T.match_buffer(codes, (batch, heads, room, STORED), CODE_DTYPE, strides=(s_cb, s_ch, s_ct, 1), align=1)
    SCALES = T.match_buffer(scales, (batch, heads, room, GROUPS), SCALE_DTYPE, strides=(s_sb, s_sh, s_st, 1), align=1)
    if not SYMMETRIC:
        ZEROS = T.match_buffer(zeros, (batch, heads, room, GROUPS), SCALE_DTYPE, strides=(s_zb, s_zh, s_zt, 1), align=1)
    BAD = T.match_buffer(bad, (T.int64(1),), "int32", align=1)

    for at in T.parallel(batch * heads):
        b: T.int64 = whole(at, heads)
        h: T.int64 = rest(at, heads)
        extremes = T.alloc_buffer((2,), "float32")
        STEPS = T.alloc_buffer((GROUPS,), "float32")
        FIRST = T.alloc_buffer((GROUPS,), "float32")
        strange = T.alloc_buffer((1,), "int32")
        strange[0] = 0
        for t in range(count):
            for g in range(GROUPS):
                extremes[0] = X[b, h, t, g * GROUP]
                extremes[1] = X[b, h, t, g * GROUP]
                for d in range(GROUP):
                    value: T.let = X[b, h, t, g * GROUP + d]
                    extremes[0] = T.min(extremes[0], value)
                    extremes[1] = T.max(extremes[1], value)
                    strange[0] += T.Select(T.abs(value) <= T.float32(FINITE), 0, 1)
                low: T.let = extremes[0] * T.float32(CLIP)
                high: T.let = extremes[1] * T.float32(CLIP)
                if SYMMETRIC:
                    STEPS[g] = safe(held(T.max(T.abs(low), T.abs(high)) / T.float32(TOP)))
                    FIRST[g] = T.float32(-TOP)
                else:
                    STEPS[g] = safe(held(T.Select(high == low, T.abs(low), (high - low) / T.float32(MOST))))
                    FIRST[g] = held(T.nearbyint(low / STEPS[g]))
                    ZEROS[b, h, first + t, g] = T.cast(FIRST[g], SCALE_DTYPE)
                SCALES[b, h, first + t, g] = T.cast(STEPS[g], SCALE_DTYPE)
            if PER_BYTE == 1:
                for g in range(GROUPS):
                    for d in range(GROUP):
                        CODES[b, h, first + t, g * GROUP + d] = T.cast(
                            code(X[b, h, t, g * GROUP + d], STEPS[g], FIRST[g]) - T.float32(MIDDLE), CODE_DTYPE
                        )
            else:
                for j in range(STORED):
                    byte = T.alloc_buffer((1,), "int32", scope="local")
                    byte[0] = 0
                    for part in T.unroll(PER_BYTE):
                        d: T.let = part * STORED + j
                        byte[0] += T.shift_left(
                            T.cast(code(X[b, h, t, d], STEPS[T.truncdiv(d, GROUP)], FIRST[T.truncdiv(d, GROUP)]), "int32"),
                            T.int32(BITS) * part,
                        )
                    CODES[b, h, first + t, j] = T.cast(byte[0], CODE_DTYPE)
        if strange[0] > 0:
            BAD[0] = strange[0]
