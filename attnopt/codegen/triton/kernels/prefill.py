"""Attention of many queries: softmax over streamed blocks of keys, which are never all in memory.

    o[q] = sum_k exp(s[q, k] - top) v[k] / sum_k exp(s[q, k] - top)         s = score_mod(q k' * SCALE), -inf where hidden

    items     one for each block of BLOCK_Q rows of one head: ceil(q_len / BLOCK_Q) * batch * heads
    grid      one program for each item; or as many as run at once, which take the items in turns, those with most keys first
    a program holds its queries, walks over blocks of BLOCK_K keys, and keeps for each row the largest score (b_top), the sum of
              weights (b_sum) and the weighted sum of values (b_o); each grows by exp2(old top - new top) when the top moves
    ranges    key_range says which keys the block of rows can see at all, inner_range which of them every row sees: blocks inside
              need no mask (phase 0), blocks at the edges do (phase 1); what lies outside is not read
    list      of blocks of keys that data chose: p_list [batch * heads, rows of the list, 1 + blocks] holds how many, then which; every
              one of them is masked, and no other is read
    packed    sequences of any lengths stand one after the other, those of q from q_starts[b] to q_starts[b + 1]; positions count
              from 0 in each, and p_work lists the blocks of queries: sequence, and block within it
    prefixes  p_ pointer   d_ descriptor   s_ stride   i_ index of a program or block   o_ offsets   m_ mask   b_ block of data
    widths    rows of q and k are D channels, rows of v are E: a power of two (…_MAIN), and a second one (…_REST) for what is left

Positions past the end of queries or keys read the last row again (or zeros); only the store, and the mask of the last block, leave
them out. Sources: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning"; "FlashAttention-3".
"""

import triton
import triton.language as tl

from attnopt.codegen.triton.kernels.prefill_attend import attend
from attnopt.codegen.triton.kernels.prefill_blocks import item_of
from attnopt.codegen.triton.kernels.prefill_holes import BLOCK_Q, PACKED, PERSISTENT


@triton.jit
def prefill(
    p_q, p_k, p_v, p_o, p_lse, d_q, d_q_rest, d_k, d_k_rest, d_v, d_v_rest, p_norms,
    p_q_scales, p_k_scales, p_v_scales, p_v_means, p_shifts, p_deltas,
    operands,
    p_q_starts, p_k_starts, p_work, p_items, p_list,
    q_len, kv_len, rows, batch, heads, key_heads, value_heads, section,
    s_qb, s_qh, s_qm, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn,
):  # fmt: skip
    if PERSISTENT:
        if PACKED:
            items = tl.load(p_items) * heads
        else:
            items = tl.cdiv(q_len, BLOCK_Q) * batch * heads
        programs = tl.num_programs(0)
        turns = items // programs
        turns += tl.where(item_of(turns, programs) < items, 1, 0)
        for turn in range(0, turns):
            attend(
                item_of(turn, programs),
                p_q, p_k, p_v, p_o, p_lse, d_q, d_q_rest, d_k, d_k_rest, d_v, d_v_rest, p_norms,
                p_q_scales, p_k_scales, p_v_scales, p_v_means, p_shifts, p_deltas,
                operands,
                p_q_starts, p_k_starts, p_work, p_list,
                q_len, kv_len, rows, batch, heads, key_heads, value_heads, section,
                s_qb, s_qh, s_qm, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn,
            )  # fmt: skip
    else:
        attend(
            tl.program_id(0),
            p_q, p_k, p_v, p_o, p_lse, d_q, d_q_rest, d_k, d_k_rest, d_v, d_v_rest, p_norms,
            p_q_scales, p_k_scales, p_v_scales, p_v_means, p_shifts, p_deltas,
            operands,
            p_q_starts, p_k_starts, p_work, p_list,
            q_len, kv_len, rows, batch, heads, key_heads, value_heads, section,
            s_qb, s_qh, s_qm, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn,
        )  # fmt: skip
