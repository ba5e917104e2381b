"""What rows see and how their scores change: functions of decode.py that a spec fills in.

    causal & window(512)   ->   first_key: q_first - 511     end_key: q_last + 1     seen_by_all_from: q_last - 511 …

Those with a result are expressions; those marked `T.inline` are statements on one score, S[i, j] of query q (row `row` of its tensor)
of head h with key k.
"""

from tvm.script import tirx as T


def first_key(q_first, q_last, q_len, kv_len):
    """The first key that any of the queries q_first … q_last sees."""
    return 0


def end_key(q_first, q_last, q_len, kv_len):
    """One past the last key that any of the queries q_first … q_last sees."""
    return kv_len


def first_inner_key(q_first, q_last, q_len, kv_len):
    """The first of the keys that all of the queries q_first … q_last see."""
    return 0


def end_inner_key(q_first, q_last, q_len, kv_len):
    """One past the last of the keys that all of the queries q_first … q_last see."""
    return kv_len


def leading_keys(q_len, kv_len):
    """Keys 0 … n - 1 that are visible besides the range."""
    return 0


def query_offset(q_len, kv_len):
    """The position of the first query."""
    return 0


@T.inline
def score_mod(S, i, j, b, h, q, row, k, q_len, kv_len, operands):
    """What happens to a score after the first scale."""


@T.inline
def mask_mod(S, i, j, b, h, q, row, k, q_len, kv_len, operands):
    """Minus infinity where a query does not see a key."""


@T.inline
def inner_mask_mod(S, i, j, b, h, q, row, k, q_len, kv_len, operands):
    """What of mask_mod is left to be asked inside the range that every row sees."""


@T.inline
def sink_logit(X, b, h, q, row, q_len, kv_len, operands):
    """One more logit of each row, which takes weight and gives nothing: X[0]."""
    X[0] = T.float32(0)
