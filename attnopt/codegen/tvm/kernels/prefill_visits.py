"""Which pieces of CHUNK keys prefill.py visits when only data tells: the functions that ask.

    is_chosen     a list of blocks that is an operand has it
    may_match     the spans, smallest to largest, of what queries and keys of the piece must have alike overlap
    all_match     both spans are one number, the same: every query sees every key

key_spans [pieces, MATCHES, 2] are found before queries are looked at, spans [MATCHES, 2] once for a block of them.
"""

from tvm.script import tirx as T

from attnopt.codegen.tvm.kernels.prefill_holes import CHUNK, MATCHES


def is_chosen(b, h, row_first, row_last, k_first, operands):
    """Whether the list has the keys from k_first on for some query of a block."""
    return T.bool(True)


@T.inline
def match_queries(spans, b, h, q_first, row_first, q_len, kv_len, operands):
    """The smallest and the largest over the queries of a block."""


@T.inline
def match_keys(key_spans, at, b, h, k_first, keys, q_len, kv_len, operands):
    """The smallest and the largest over the keys of a piece."""


@T.inline
def match_all_keys(key_spans, batch, heads, chunks, q_len, kv_len, operands):
    """Pieces of CHUNK keys, in parallel. heads: 1 where all have the same."""
    for i_piece in T.parallel(batch * heads * chunks):
        i_row: T.let = T.truncdiv(i_piece, chunks)
        start: T.let = T.truncmod(i_piece, chunks) * CHUNK
        match_keys(
            key_spans, i_piece, T.truncdiv(i_row, heads), T.truncmod(i_row, heads), start, T.min(kv_len - start, CHUNK),
            q_len, kv_len, operands,
        )  # fmt: skip


def may_match(spans, key_spans, at):
    found = T.bool(True)
    for i in range(MATCHES):
        found = found & (key_spans[at, i, 0] <= spans[i, 1]) & (spans[i, 0] <= key_spans[at, i, 1])
    return found


def all_match(spans, key_spans, at):
    found = T.bool(True)
    for i in range(MATCHES):
        one = (key_spans[at, i, 0] == key_spans[at, i, 1]) & (spans[i, 0] == spans[i, 1])
        found = found & one & (spans[i, 0] == key_spans[at, i, 0])
    return found
