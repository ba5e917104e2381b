"""How PyTorch calls prefill.py: shapes and strides of tensors, descriptors, the list of work of packed sequences, the grid.

attention(q, k, v)                                 q [B, H, Q, D], k [B, G, K, D], v [B, G', K, E]   ->   o [B, H, Q, E]
attention_packed(q, k, v, q_starts, k_starts)      q [rows, H, D], k [keys, G, D], v [keys, G', E]   ->   o [rows, H, E]
"""

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from attnopt.codegen.triton.kernels.prefill import prefill
from attnopt.codegen.triton.kernels.prefill_coding import coded_keys, coded_queries, coded_values, scored_means, smooth
from attnopt.codegen.triton.kernels.prefill_holes import (
    BLOCK_K, BLOCK_Q, DESCRIPTORS, D_MAIN, D_REST, E_MAIN, E_REST, FP8_VALUES, HALF_VALUES, INT8_SCORES, K_NORM, LISTED, LONGEST_FIRST, LSE,
    NUM_STAGES, NUM_WARPS, OFFSET, PACKED, PERSISTENT, PROGRAMS, tiles_map,
)  # fmt: skip
from attnopt.codegen.triton.kernels.prefill_norms import NORM_ROWS, key_norms


def described(x, rows, width):
    """A descriptor of x [B, H, L, D] that moves blocks of rows and channels."""
    strides = [stride if size > 1 else x.shape[3] for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows.value, width.value])


def whole_vectors(x):
    """x [B, H, L, D] with rows that start at multiples of 16 bytes, as descriptors need them: a copy where they do not."""
    strides = [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    fits = x.data_ptr() % 16 == 0 and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in strides)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def schedule(q_starts, k_starts, rows):
    """The blocks of queries of all sequences, those that see most keys first, and how many there are, without waiting for the GPU.

    q_starts, k_starts int32 [batch + 1], rows: how many queries there are -> int32 [at most blocks, 2] of sequence and block within
    it, int32 [1]. Depends on the lengths only: the layers of a model can share it.
    """
    q_len, kv_len = q_starts.diff(), k_starts.diff()
    blocks = (q_len + BLOCK_Q.value - 1) // BLOCK_Q.value
    ends = blocks.cumsum(0, dtype=torch.int32)
    item = torch.arange(rows // BLOCK_Q.value + len(blocks), device=q_starts.device, dtype=torch.int32)
    sequence = torch.searchsorted(ends, item, right=True).clamp(max=len(blocks) - 1)
    block = item - (ends - blocks)[sequence]
    keys = kv_len[sequence]
    if LONGEST_FIRST:
        reach = (block + 1) * BLOCK_Q.value
        if OFFSET:
            reach = reach + (kv_len - q_len)[sequence]
        keys = torch.minimum(keys, reach)
    order = torch.where(item < ends[-1], keys, -1).argsort(descending=True)  # those that are none come last
    return torch.stack([sequence, block], 1).to(torch.int32)[order].contiguous(), ends[-1:]


def listed(x, batch, heads):
    """x bool [batch | 1, heads | 1, M, N]: which tiles are visited -> int32 [batch * heads, M, 1 + N]: how many, then which in order."""
    x = x.bool().expand(batch, heads, -1, -1).flatten(0, 1)
    order = torch.argsort((~x).to(torch.uint8), dim=-1, stable=True)
    return torch.cat([x.sum(-1, keepdim=True), order], -1).to(torch.int32)


def machine(device):
    """How many programs run at once, and the bytes of the cache that they share."""
    if device.type != "cuda":
        return 3, 1 << 16  # the interpreter: few enough that each takes several turns
    about = torch.cuda.get_device_properties(device)
    return about.multi_processor_count * PROGRAMS, about.L2_cache_size


def launch(q, k, v, q_starts, k_starts, tensors, work, o):
    """q [B, H, Q, D], k [B, G, K, D], v [B, G', K, E]; of packed sequences B is 1 and Q and K count the rows of all."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if DESCRIPTORS:
        q, k, v = (whole_vectors(x) for x in (q, k, v))
    batch, heads, q_len, _ = q.shape
    kv_len, key_heads = k.shape[2], k.shape[1]
    if o is None:
        if PACKED:
            o = torch.empty((q_len, heads, v.shape[3]), dtype=q.dtype, device=q.device)
        else:
            o = torch.empty((batch, heads, q_len, v.shape[3]), dtype=q.dtype, device=q.device)
    if LSE:
        lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    else:
        lse = None
    if o.numel() > 0:
        if PACKED:
            work, items = schedule(q_starts, k_starts, q_len) if work is None else work
            grid = len(work) * heads
        else:
            items = None
            grid = triton.cdiv(q_len, BLOCK_Q.value) * batch * heads
        if PERSISTENT:
            programs, cache = machine(q.device)
            grid = min(programs, grid)
        if PERSISTENT and not PACKED:
            # Heads whose keys and values fill half of the cache are worked on at a time.
            group = cache // 2 // (kv_len * (k.shape[3] + v.shape[3]) * k.element_size())
            section = min(max(1, group) * (heads // key_heads), batch * heads)
        else:
            section = None
        if LISTED:
            visits = listed(tiles_map, batch, heads)
        else:
            visits = None
        if INT8_SCORES:
            k_means = smooth(k)
            q, q_scales, shifts, q_means = coded_queries(q, k_means, key_heads)
            deltas = scored_means(q_means, k, k_means)
            k, k_scales = coded_keys(k, k_means)
        else:
            q_scales = k_scales = shifts = deltas = None
        if FP8_VALUES or HALF_VALUES:
            v, v_scales, v_means = coded_values(v)
        else:
            v_scales = v_means = None
        if DESCRIPTORS and FP8_VALUES:
            d_q, d_k, d_v = described(q, BLOCK_Q, D_MAIN), described(k, BLOCK_K, D_MAIN), described(v, E_MAIN, BLOCK_K)
        elif DESCRIPTORS:
            d_q, d_k, d_v = described(q, BLOCK_Q, D_MAIN), described(k, BLOCK_K, D_MAIN), described(v, BLOCK_K, E_MAIN)
        else:
            d_q = d_k = d_v = None
        if DESCRIPTORS and D_REST:
            d_q_rest, d_k_rest = described(q, BLOCK_Q, D_REST), described(k, BLOCK_K, D_REST)
        else:
            d_q_rest = d_k_rest = None
        if DESCRIPTORS and E_REST and FP8_VALUES:
            d_v_rest = described(v, E_REST, BLOCK_K)
        elif DESCRIPTORS and E_REST:
            d_v_rest = described(v, BLOCK_K, E_REST)
        else:
            d_v_rest = None
        if K_NORM:
            norms = torch.empty((batch, kv_len, key_heads), dtype=torch.float32, device=q.device)
            key_norms[(triton.cdiv(kv_len, NORM_ROWS.value), batch * key_heads)](
                k, norms, kv_len, key_heads, k.stride(0), k.stride(1), k.stride(2),
            )  # fmt: skip
        else:
            norms = None
        prefill[(grid,)](
            q, k, v, o, lse, d_q, d_q_rest, d_k, d_k_rest, d_v, d_v_rest, norms,
            q_scales, k_scales, v_scales, v_means, shifts, deltas,
            tensors,
            q_starts, k_starts, work, items, visits,
            q_len, kv_len, q_len, batch, heads, key_heads, v.shape[1], section,
            q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
    if LSE:
        return o, lse
    else:
        return o


def attention(q, k, v, given=None, o=None):
    """q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E] -> o [B, H, Q, E], and the log-sum-exp [B, H, Q] where the kernel stores it.

    An `o` that is given is written to; it must be contiguous.
    """
    return launch(q, k, v, None, None, given, None, o)


def attention_packed(q, k, v, q_starts, k_starts, given=None, work=None, o=None):
    """q [rows, H, D], k [keys, G, D], v [keys, G, E] -> o [rows, H, E], and the log-sum-exp [1, H, rows] where the kernel stores it.

    Sequence b has rows q_starts[b] … q_starts[b + 1] - 1 of q, and those of k_starts of k and v: int32 [B + 1], from 0 on. work:
    what `schedule` made of these lengths for another layer. An `o` that is given is written to; it must be contiguous.
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # one batch of all rows
    return launch(q, k, v, q_starts, k_starts, given, work, o)
