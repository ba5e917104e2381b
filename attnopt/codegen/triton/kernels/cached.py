"""One block of keys and values of a cache for the rows of a program of decode.py: found, decoded, multiplied.

    scores   q k' [BLOCK_Q, BLOCK_K]          weigh   b_o * b_decay + b_p v, by parts          places   where tokens stand

    x = (code + zero) * scale. A scale that a whole token or a group of its channels shares ("token", "group") stands outside of the
    product: sum_d q_d x_d = (sum_d q_d code_d + zero * sum_d q_d) * scale, so that codes are only converted. One that all tokens
    share ("channel") goes into the query, or acts on the output. Only a scale of its own for each channel in each group of tokens
    ("block") is multiplied number by number.
    parts     a row is D_PIECES pieces of D_PIECE channels, as its width and groups ask for; of int4, whose byte j holds the
              channels j and D_STORED + j, each piece is D_SHARES = 2 parts, the halves of its bytes; of int2 it is four
    pages     token n stands in page p_pages[sequence, n // PAGE] at n % PAGE

Source: "KIVI" (keys by channel in groups of tokens, values by token in groups of channels).
"""

import triton
import triton.language as tl

BLOCK_Q = tl.constexpr(16)
BLOCK_K = tl.constexpr(32)
DTYPE = tl.constexpr("float16")
PRECISION = tl.constexpr("ieee")
D_PIECE = tl.constexpr(16)
D_PIECES = tl.constexpr(1)
D_SHARES = tl.constexpr(1)
D_STORED = tl.constexpr(16)
D_PADDED = tl.constexpr(False)
E_PIECE = tl.constexpr(16)
E_PIECES = tl.constexpr(1)
E_SHARES = tl.constexpr(1)
E_STORED = tl.constexpr(16)
E_PADDED = tl.constexpr(False)
K_STORAGE = tl.constexpr("plain")
K_SCALES = tl.constexpr("none")
K_GROUP = tl.constexpr(16)
K_ZEROS = tl.constexpr(False)
K_MIDDLE = tl.constexpr(0.0)
K_CENTRE = tl.constexpr(0)
K_BITS = tl.constexpr(0)
K_TOP = tl.constexpr(0)
V_STORAGE = tl.constexpr("plain")
V_SCALES = tl.constexpr("none")
V_GROUP = tl.constexpr(16)
V_ZEROS = tl.constexpr(False)
V_MIDDLE = tl.constexpr(0.0)
V_CENTRE = tl.constexpr(0)
V_BITS = tl.constexpr(0)
V_TOP = tl.constexpr(0)
V_SHIFTS = tl.constexpr(False)
V_RELATIVE = tl.constexpr(False)
PAGED = tl.constexpr(False)
PAGE = tl.constexpr(16)
WHOLE_PAGES = tl.constexpr(False)


@triton.jit
def places(i_b, i_n, kv_len, p_pages, s_pages, EDGE: tl.constexpr):
    """Where the tokens of block i_n stand: their page (or their sequence), and their row in it [BLOCK_K]."""
    o_j = tl.arange(0, BLOCK_K)
    if EDGE:
        o_j = tl.minimum(o_j, kv_len - 1 - i_n * BLOCK_K)
    if PAGED:
        if WHOLE_PAGES:
            i_page = tl.cast(tl.load(p_pages + i_b * s_pages + i_n * BLOCK_K // PAGE), tl.int64)
            o_row = o_j + i_n * BLOCK_K % PAGE
        else:
            o_n = o_j + i_n * BLOCK_K
            i_page = tl.cast(tl.load(p_pages + i_b * s_pages + o_n // PAGE), tl.int64)  # [BLOCK_K]
            o_row = o_n % PAGE
    else:
        i_page = i_b
        o_row = tl.cast(i_n, tl.int64) * BLOCK_K + o_j
    return i_page, o_row


@triton.jit
def from_share(b_x, SHARE: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr, CENTRE: tl.constexpr, dtype: tl.constexpr):
    """The codes 0 … TOP of BITS bits in one share of each byte, less CENTRE; the products' type holds all of them exactly."""
    if DTYPE == "bfloat16":
        # The last digits of 128, where one more is one more.
        return (((b_x.to(tl.uint16) >> (BITS * SHARE)) & TOP) | 0x4300).to(dtype, bitcast=True) - (128 + CENTRE)
    elif DTYPE == "float16":
        return (((b_x.to(tl.uint16) >> (BITS * SHARE)) & TOP) | 0x6400).to(dtype, bitcast=True) - (1024 + CENTRE)
    else:
        return ((b_x >> (BITS * SHARE)) & TOP).to(dtype) - CENTRE


@triton.jit
def from_fp8(b_x, dtype: tl.constexpr):
    """E4M3 under the exponent of a wider type: sign, exponent and digits keep their order, and a power of two moves the exponent."""
    if DTYPE == "float32":
        b_bits = b_x.to(tl.uint32)
        b_wide = (((b_bits & 128) << 24) | ((b_bits & 127) << 20)).to(dtype, bitcast=True) * 1.329227995784916e36
    elif DTYPE == "bfloat16":
        b_bits = b_x.to(tl.uint16)
        b_wide = (((b_bits & 128) << 8) | ((b_bits & 127) << 4)).to(dtype, bitcast=True) * 1.329227995784916e36
    else:
        b_bits = b_x.to(tl.uint16)
        b_wide = (((b_bits & 128) << 8) | ((b_bits & 127) << 7)).to(dtype, bitcast=True) * 256.0
    return b_wide.to(dtype)


@triton.jit
def scores(b_q, b_q_sum, p_k, p_ks, p_kz, o_k, o_ks, dtype: tl.constexpr):
    """q k' of the rows with one block of keys [BLOCK_Q, BLOCK_K]."""
    b_s = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for P in tl.static_range(0, D_PIECES):
        o_d = tl.arange(0, D_PIECE) + P * D_PIECE
        p_kd = p_k + o_k[None, :] + o_d[:, None]
        if D_PADDED:
            b_k = tl.load(p_kd, mask=o_d[:, None] < D_STORED, other=0)  # [D_PIECE, BLOCK_K]
        else:
            b_k = tl.load(p_kd)  # [D_PIECE, BLOCK_K]
        for SHARE in tl.static_range(0, D_SHARES):
            if K_BITS:
                b_codes = from_share(b_k, SHARE, K_BITS, K_TOP, K_CENTRE, dtype)
            elif K_STORAGE == "fp8":
                b_codes = from_fp8(b_k, dtype)
            else:
                b_codes = b_k.to(dtype)
            if K_SCALES == "block":
                o_c = o_ks[None, :] + (o_d + SHARE * D_STORED)[:, None]
                m_d = o_d[:, None] < D_STORED
                b_step = tl.cast(tl.load(p_ks + o_c, mask=m_d, other=0.0), tl.float32)  # [D_PIECE, BLOCK_K]
                if K_ZEROS:
                    b_zero = tl.cast(tl.load(p_kz + o_c, mask=m_d, other=0.0), tl.float32)
                    b_codes = ((tl.cast(b_codes, tl.float32) + (b_zero + K_MIDDLE)) * b_step).to(dtype)
                else:
                    b_codes = (tl.cast(b_codes, tl.float32) * b_step).to(dtype)
            if K_SCALES == "group":
                b_part = tl.dot(b_q[P * D_SHARES + SHARE], b_codes, input_precision=PRECISION)
                o_g = o_ks + (SHARE * D_STORED + P * D_PIECE) // K_GROUP
                b_step = tl.cast(tl.load(p_ks + o_g), tl.float32)  # [BLOCK_K]
                if K_ZEROS:
                    b_zero = tl.cast(tl.load(p_kz + o_g), tl.float32) + K_MIDDLE
                    b_part += b_q_sum[P * D_SHARES + SHARE][:, None] * b_zero[None, :]
                b_s += b_part * b_step[None, :]
            else:
                b_s = tl.dot(b_q[P * D_SHARES + SHARE], b_codes, b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def weigh(b_p, b_decay, b_o, b_shift, p_v, p_vs, p_vz, o_v, o_vs, dtype: tl.constexpr):
    """b_o * b_decay + b_p v of one block, by parts; b_shift: what zero points add to each row, before scales by channel."""
    b_sums = ()
    b_shifts = ()
    for P in tl.static_range(0, E_PIECES):
        o_e = tl.arange(0, E_PIECE) + P * E_PIECE
        p_ve = p_v + o_v[:, None] + o_e[None, :]
        if E_PADDED:
            b_v = tl.load(p_ve, mask=o_e[None, :] < E_STORED, other=0)  # [BLOCK_K, E_PIECE]
        else:
            b_v = tl.load(p_ve)  # [BLOCK_K, E_PIECE]
        for SHARE in tl.static_range(0, E_SHARES):
            if V_BITS:
                b_codes = from_share(b_v, SHARE, V_BITS, V_TOP, V_CENTRE, dtype)
            elif V_STORAGE == "fp8":
                b_codes = from_fp8(b_v, dtype)
            else:
                b_codes = b_v.to(dtype)
            if V_SCALES == "block":
                o_c = o_vs[:, None] + (o_e + SHARE * E_STORED)[None, :]
                m_e = o_e[None, :] < E_STORED
                b_step = tl.cast(tl.load(p_vs + o_c, mask=m_e, other=0.0), tl.float32)  # [BLOCK_K, E_PIECE]
                if V_ZEROS:
                    b_zero = tl.cast(tl.load(p_vz + o_c, mask=m_e, other=0.0), tl.float32)
                    b_codes = ((tl.cast(b_codes, tl.float32) + (b_zero + V_MIDDLE)) * b_step).to(dtype)
                else:
                    b_codes = (tl.cast(b_codes, tl.float32) * b_step).to(dtype)
            if V_SCALES == "group":
                o_g = o_vs + (SHARE * E_STORED + P * E_PIECE) // V_GROUP
                b_step = tl.cast(tl.load(p_vs + o_g), tl.float32)  # [BLOCK_K]
                if V_RELATIVE:
                    b_peak = tl.maximum(tl.max(b_step, 0), 1e-30)  # float16 has few small numbers: weights stay near 1
                    b_step = b_step / b_peak
                b_w = (b_p * b_step[None, :]).to(dtype)
            else:
                b_w = b_p.to(dtype)
            b_part = b_o[P * E_SHARES + SHARE] * b_decay[:, None]
            if V_RELATIVE:
                b_part += tl.dot(b_w, b_codes, input_precision=PRECISION) * b_peak
            else:
                b_part = tl.dot(b_w, b_codes, b_part, input_precision=PRECISION)
            b_sums = b_sums + (b_part,)
            if V_SHIFTS:
                if V_SCALES == "group":
                    b_zero = tl.cast(tl.load(p_vz + o_g), tl.float32) + V_MIDDLE
                    b_add = tl.sum(tl.cast(b_w, tl.float32) * b_zero[None, :], 1)
                else:
                    b_add = tl.sum(tl.cast(b_w, tl.float32), 1)
                if V_RELATIVE:
                    b_add = b_add * b_peak
                b_shifts = b_shifts + (b_shift[P * E_SHARES + SHARE] * b_decay + b_add,)
    if V_SHIFTS:
        return b_sums, b_shifts
    else:
        return b_sums
