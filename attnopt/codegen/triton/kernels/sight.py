"""What rows see and how their scores change: functions of decode.py that a spec fills in, as it does those of prefill.py.

    causal & window(512)   ->   key_range: q_first - 511, q_last + 1        inner_range: q_last - 511, q_first + 1
"""

import triton


@triton.jit
def key_range(q_first, q_last, q_len, kv_len):
    """The first key that any of the queries q_first … q_last sees, and the one after the last."""
    return 0, kv_len


@triton.jit
def inner_range(q_first, q_last, q_len, kv_len):
    """The first of the keys that all of the queries q_first … q_last see, and the one after the last."""
    return 0, kv_len


@triton.jit
def leading_keys(q_len, kv_len):
    """Keys 0 … n - 1 that are visible besides the range."""
    return 0


@triton.jit
def score_mod(score, b, h, q, row, k, m_k, q_len, kv_len, operands):
    """What happens to a score after the first scale; rows stand along the first axis, keys along the second."""
    return score


@triton.jit
def mask_mod(b, h, q, row, k, m_k, q_len, kv_len, operands):
    """Whether a query sees a key."""
    return True


@triton.jit
def inner_mask_mod(b, h, q, row, k, m_k, q_len, kv_len, operands):
    """What of mask_mod is left to be asked inside the range that every row sees."""
    return True
