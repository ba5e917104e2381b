"""How prefill.py reads blocks of rows, which tiles of a list need no mask, and the order in which programs take blocks of queries.

A row of channels is read through pointers, or a block of rows at once by the copy engine (Hopper and later) through a descriptor
of [batch, heads, length, channels]: what lies past the end of a tensor is zero there.
"""

import triton
import triton.language as tl

from attnopt.codegen.triton.kernels.prefill_holes import BLOCK_K, D, D_PADDED, D_REST, E, E_PADDED, E_REST, LIST_KEYS, LIST_PART


@triton.jit
def load_d(p, o_d):
    """Channels of rows of q or k; o_d lies along the axis of channels."""
    if D_PADDED and not D_REST:
        return tl.load(p + o_d, mask=o_d < D, other=0.0)
    else:
        return tl.load(p + o_d)


@triton.jit
def load_d_rest(p, o_d_rest):
    """The channels after the first D_MAIN."""
    if D_PADDED:
        return tl.load(p + o_d_rest, mask=o_d_rest < D, other=0.0)
    else:
        return tl.load(p + o_d_rest)


@triton.jit
def load_e(p, o_e):
    """Channels of rows of v."""
    if E_PADDED and not E_REST:
        return tl.load(p + o_e, mask=o_e < E, other=0.0)
    else:
        return tl.load(p + o_e)


@triton.jit
def load_e_rest(p, o_e_rest):
    """The channels after the first E_MAIN."""
    if E_PADDED:
        return tl.load(p + o_e_rest, mask=o_e_rest < E, other=0.0)
    else:
        return tl.load(p + o_e_rest)


@triton.jit
def load_block(d, i_b, i_h, row, channel, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows row … row + ROWS - 1 of a head, from a channel on, through a descriptor."""
    return tl.reshape(d.load([tl.cast(i_b, tl.int32), tl.cast(i_h, tl.int32), row, channel]), [ROWS, WIDTH])


@triton.jit
def sum_of_values(p_v, s_vn, kv_len, o_e):
    """The sum over all keys of some channels of the values; o_e: which."""
    b_total = tl.zeros_like(o_e).to(tl.float32)
    for i_n in range(0, tl.cdiv(kv_len, BLOCK_K)):
        o_n = i_n * BLOCK_K + tl.arange(0, BLOCK_K)
        p_vn = p_v + tl.cast(o_n, tl.int64)[:, None] * s_vn
        b_v = tl.load(p_vn + o_e[None, :], mask=(o_n < kv_len)[:, None] & (o_e < E)[None, :], other=0.0)
        b_total += tl.sum(tl.cast(b_v, tl.float32), 0)
    return b_total


@triton.jit
def within_range(p_tiles, tiles, inner_first, inner_end):
    """How many tiles of a list, whose numbers ascend, lie before the blocks inner_first … inner_end - 1, and how many inside of them."""
    before = 0
    inside = 0
    for i in range(0, tl.cdiv(tiles, LIST_PART)):
        o_t = i * LIST_PART + tl.arange(0, LIST_PART)
        b_first = tl.load(p_tiles + o_t, mask=o_t < tiles, other=0) * LIST_KEYS
        m_inside = (o_t < tiles) & (b_first >= inner_first) & (b_first + LIST_KEYS <= inner_end)
        before += tl.sum(tl.cast((o_t < tiles) & (b_first < inner_first), tl.int32), 0)
        inside += tl.sum(tl.cast(m_inside, tl.int32), 0)
    return before, inside


@triton.jit
def item_of(turn, programs):
    """What this program does in a turn, of a list that is sorted by work: every other turn runs backwards, so that sums are even."""
    return turn * programs + tl.where(turn % 2 == 0, tl.program_id(0), programs - 1 - tl.program_id(0))
