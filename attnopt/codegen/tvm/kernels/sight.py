"""What rows see and how their scores change: functions of every family's template that a spec fills in.

    causal & window(512)   ->   first_key: q_first - 511     end_key: q_last + 1     inner_first_key: q_last - 511 …
"""

from tvm.script import tirx as T

operands = ()  # stands for the operands of the spec
held_values = ()  # stands for what is read of them before: for one query, or one query and one key. Nothing in decode.py


def between(low, x, high):
    return T.min(T.max(x, low), high)


def first_key(q_first, q_last, q_len, kv_len):
    """The first key that any of the queries q_first … q_last sees."""
    return 0


def end_key(q_first, q_last, q_len, kv_len):
    """The key after the last that any of the queries q_first … q_last sees."""
    return kv_len


def inner_first_key(q_first, q_last, q_len, kv_len):
    """The first of the keys that all of the queries q_first … q_last see."""
    return 0


def inner_end_key(q_first, q_last, q_len, kv_len):
    """The key after the last of those that all of the queries q_first … q_last see."""
    return kv_len


def leading_keys(q_len, kv_len):
    """Keys 0 … n - 1 that are visible besides the range."""
    return 0


def query_offset(q_len, kv_len):
    """The position of the first query."""
    return 0


def score_mod(score, b, h, q, row, k, q_len, kv_len, operands, held_values):
    """What happens to a score after the first scale."""
    return score


def mask_mod(b, h, q, row, k, q_len, kv_len, operands, held_values):
    """Whether a query sees a key."""
    return T.bool(True)


def inner_mask_mod(b, h, q, row, k, q_len, kv_len, operands, held_values):
    """What of mask_mod is left to be asked inside the range that every row sees."""
    return T.bool(True)


def sink_logit(b, h, q, row, q_len, kv_len, operands, held_values):
    """One more logit of each row, which takes weight and gives nothing."""
    return T.float32(0.0)


@T.inline
def match_operands():
    """The buffers of operands."""
