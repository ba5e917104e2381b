"""Which pages of a cache the newest query reads: those of the highest bounds, as a table for the decode family.

    bound(page) = sum_c max(q_c, 0) high_c + min(q_c, 0) low_c
    PAGES[t] the n of highest bound, ascending, by their first rows in the cache      TOKENS[t] their keys

parallel  over key heads, whose HEADS query heads read the smallest and largest channels of a page once; then over tables, one for each
          query head (APART) or for each key head, whose query heads go by the largest of their bounds, or (MEAN) by the mean
lanes     channels of a page stand side by side; numbers of pages do where they are compared
the nth   bounds are compared as whole numbers of the same order, ORDERED: the largest number that n of them reach is found bit by bit.
          Pages above it are taken, then the first of those that are equal to it, until there are n
recent    the last pages come before all others

Nothing is sorted: 32 passes over the bounds take less time than torch needs to sort half of them.
"""

from tvm.script import tirx as T

from attnopt.codegen.tvm.kernels.decode_lanes import across, plus, rest, vector, whole

D = 16
D_LANES = 16
LANES = 16
HEADS = 1
TABLES = 1  # of a key head
APART = False
MEAN = False
PAGE = 16
RECENT = 0
LEAST = -2147483648
MOST = 2147483647


@T.prim_func(s_tir=True)
def attention(q: T.handle, low: T.handle, high: T.handle, sizes: T.handle, pages: T.handle, tokens: T.handle):
    T.func_attr({"global_symbol": "attention", "tirx.noalias": True})
    batch, heads, groups, count, tables, chosen = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
    s_qb, s_qh, s_qm = T.int64(), T.int64(), T.int64()
    s_lb, s_lh, s_lp, s_hb, s_hh, s_hp = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
    Q = T.match_buffer(q, (batch, heads, T.int64(1), D), "float32", strides=(s_qb, s_qh, s_qm, 1), align=1)
    LOW = T.match_buffer(low, (batch, groups, count, D), "float32", strides=(s_lb, s_lh, s_lp, 1), align=1)
    HIGH = T.match_buffer(high, (batch, groups, count, D), "float32", strides=(s_hb, s_hh, s_hp, 1), align=1)
    SIZES = T.match_buffer(sizes, (T.int64(2),), "int32")  # keys of a sequence; rows that a key head has room for
    PAGES = T.match_buffer(pages, (tables, chosen), "int32", align=1)
    TOKENS = T.match_buffer(tokens, (tables,), "int32", align=1)

    padded: T.let = whole(count + LANES - 1, LANES) * LANES
    ORDERED = T.alloc_buffer((tables, padded), "int32")
    for at in T.parallel(batch * groups):
        b: T.int64 = whole(at, groups)
        g: T.int64 = rest(at, groups)
        ABOVE = T.alloc_buffer((HEADS, D), "float32")
        BELOW = T.alloc_buffer((HEADS, D), "float32")
        for h in range(HEADS):
            for d in range(D):
                ABOVE[h, d] = T.max(Q[b, g * HEADS + h, 0, d], T.float32(0))
                BELOW[h, d] = T.min(Q[b, g * HEADS + h, 0, d], T.float32(0))
        for p in range(count):
            sums = T.alloc_buffer((HEADS, D_LANES), "float32", scope="local")
            for h in T.unroll(HEADS):
                for lane in T.vectorized(D_LANES):
                    sums[h, lane] = T.float32(0)
            for c in range(D // D_LANES):
                for h in T.unroll(HEADS):
                    for lane in T.vectorized(D_LANES):
                        sums[h, lane] += (
                            ABOVE[h, c * D_LANES + lane] * HIGH[b, g, p, c * D_LANES + lane]
                            + BELOW[h, c * D_LANES + lane] * LOW[b, g, p, c * D_LANES + lane]
                        )
            for h in T.unroll(HEADS):
                sums[h, vector(0, D_LANES)] = across(plus, sums[h, vector(0, D_LANES)], D_LANES)
            if APART:
                for h in T.unroll(HEADS):
                    ORDERED[at * HEADS + h, p] = T.reinterpret("int32", sums[h, 0])
            else:
                for h in T.unroll(HEADS - 1):
                    if MEAN:
                        sums[0, 0] = sums[0, 0] + sums[h + 1, 0]
                    else:
                        sums[0, 0] = T.max(sums[0, 0], sums[h + 1, 0])
                ORDERED[at, p] = T.reinterpret("int32", sums[0, 0])

    for t in T.parallel(tables):
        reached = T.alloc_buffer((LANES,), "int32")
        TAKEN = T.alloc_buffer((count + 1,), "int32")
        state = T.alloc_buffer((3,), "int32")  # the number that n reach; how many are still to be counted or taken; how many are taken
        for c in range(whole(padded, LANES)):
            for lane in T.vectorized(LANES):  # of negative reals the larger has the smaller bits
                bits: T.let = ORDERED[t, c * LANES + lane]
                ORDERED[t, c * LANES + lane] = T.bitwise_xor(bits, T.bitwise_and(T.shift_right(bits, 31), MOST))
        for p in range(count, padded):
            ORDERED[t, p] = LEAST
        for p in range(T.max(count - RECENT, 0), count):
            ORDERED[t, p] = MOST
        state[0] = LEAST
        for bit in range(32):
            asked: T.let = T.Select(bit == 0, 0, T.bitwise_or(state[0], T.shift_left(1, 31 - bit)))
            for lane in T.vectorized(LANES):
                reached[lane] = 0
            for c in range(whole(padded, LANES)):
                for lane in T.vectorized(LANES):
                    reached[lane] += T.Select(ORDERED[t, c * LANES + lane] >= asked, 1, 0)
            state[1] = 0
            for lane in range(LANES):
                state[1] += reached[lane]
            if state[1] >= T.cast(chosen, "int32"):
                state[0] = asked
        state[1] = T.cast(chosen, "int32")
        for p in range(count):
            state[1] -= T.Select(ORDERED[t, p] > state[0], 1, 0)
        state[2] = 0
        for p in range(count):
            equal: T.let = T.Select((ORDERED[t, p] == state[0]) & (state[1] > 0), 1, 0)
            TAKEN[state[2]] = T.cast(p, "int32")  # the next is written over it where it is not taken
            state[2] += equal + T.Select(ORDERED[t, p] > state[0], 1, 0)
            state[1] -= equal
        base: T.let = T.cast(whole(t, TABLES), "int32") * SIZES[1]
        for n in range(chosen):
            PAGES[t, n] = base + TAKEN[n] * PAGE
        short: T.let = T.cast(count * PAGE, "int32") - SIZES[0]  # keys that the newest page lacks
        TOKENS[t] = T.cast(chosen * PAGE, "int32") - T.Select(TAKEN[chosen - 1] == T.cast(count - 1, "int32"), short, 0)
