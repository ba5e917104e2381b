"""Ranges of keys against the mask itself: nothing visible lies outside, nothing hidden inside the inner range."""

from __future__ import annotations

import pytest

from attnopt.codegen.triton.kernels.prefill_eager import visited
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.grammar import parse_expr
from attnopt.ir.ranges import Range, key_range

MASKS = [
    "causal", "k < q", "window(5)", "lookahead(3)", "window(5) & lookahead(3)", "causal & window(1)", "causal & window(0)",
    "global(4)", "last(4)", "chunk(6)", "causal & chunk(8)", "near_blocks(4, 1)", "near_blocks(3, 0) & causal", "diagonal",
    "k // 4 <= q // 4", "k // 4 < q // 4", "k // 4 >= q // 4 - 2 & causal", "q // 4 >= k // 4", "k > q - 6 & k - q <= 2",
    "abs(q - k) <= 4", "abs(k - q) < 4", "2 * q >= k", "k + q < 30", "q - 2 * k < 5", "size(k) - k > 3 & causal", "k + 3 <= size(q)",
    "causal & (window(4) | global(7))", "window(3) & lookahead(3) | global(2)", "window(2) & lookahead(2) | global(30)",
    "window(3) | global_query(2)",
    "causal & (window(3) | window(9) & dilated(2))", "(window(4) | global(3)) & (lookahead(2) | global(6))",
    "causal | global(9)", "causal & (diagonal | global(2))", "dilated(3)", "causal & dilated(3)", "q < 7", "causal & q > 2",
    "chunk(5) | diagonal", "k <= q & k <= 9", "(k < 5) | (k < 9 & causal)", "window(4) & (last(9) | diagonal)", "k == 3", "k == q - 2",
]  # fmt: skip


def rows_of(mask: Expr, q_len: int, kv_len: int, offset: int) -> list[list[bool]]:
    seen = evaluate(mask, Grid(1, 1, q_len, kv_len, offset)).bool().expand(1, 1, q_len, kv_len)
    return seen[0, 0].tolist()


@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize(("q_len", "kv_len", "offset"), [(23, 23, 0), (9, 30, 21), (30, 9, 0), (8, 31, -3)])
def test_ranges_hold(text, q_len, kv_len, offset):
    mask = parse_expr(text)
    scope = key_range(mask)
    seen = rows_of(mask, q_len, kv_len, offset)
    for block_q in (1, 4, 7):
        for start in range(0, q_len, block_q):
            rows = range(start, min(start + block_q, q_len))
            for block_k in (1, 3, 4):
                found = dict(visited(scope, offset + rows[0], offset + rows[-1], q_len, kv_len, block_k))
                blocks = {i: range(i * block_k, min((i + 1) * block_k, kv_len)) for i in range(-(-kv_len // block_k))}
                missed = [i for i, keys in blocks.items() if i not in found and any(seen[r][k] for r in rows for k in keys)]
                assert missed == []
                inner = [i for i, edge in found.items() if not edge]
                if scope.undecided is None:
                    assert [i for i in inner if not all(seen[r][k] for r in rows for k in blocks[i])] == []


@pytest.mark.parametrize("text", MASKS)
def test_never_empty_is_proved_only_where_it_holds(text):
    mask = parse_expr(text)
    if key_range(mask).never_empty:
        assert all(any(row) for row in rows_of(mask, 40, 12, 0))


@pytest.mark.parametrize(
    ("text", "first", "end", "inner_first", "inner_end"),
    [
        ("causal", "", "q_last + 1", "", "q_first + 1"),
        ("window(512)", "q_first - 511", "", "q_last - 511", ""),
        ("window(8) & lookahead(3)", "q_first - 7", "q_last + 3", "q_last - 7", "q_first + 3"),
        ("chunk(64)", "q_first // 64 * 64", "q_last // 64 * 64 + 64", "q_last // 64 * 64", "q_first // 64 * 64 + 64"),
        ("last(4)", "size(k) - 4", "", "size(k) - 4", ""),
    ],
)
def test_closed_forms(text, first, end, inner_first, inner_end):
    found = key_range(parse_expr(text))
    sides = (found.first, found.end, found.inner_first, found.inner_end)
    named = [" ".join(map(str, side)).replace("size(q_first)", "q_first").replace("size(q_last)", "q_last") for side in sides]
    assert named == [first, end, inner_first, inner_end]
    assert found.undecided is None


def test_what_is_left_to_the_mask():
    found = key_range(parse_expr("causal & padding & window(8) & document"))
    assert str(found.undecided) == "padding & document"
    assert len(found.first) == len(found.end) == 1
    assert not found.never_empty


def test_leading_keys():
    found = key_range(parse_expr("causal & (window(8) | global(4))"))
    assert (str(found.leading), found.undecided) == ("4", None)
    assert [str(x) for x in found.first] == ["size(q_first) - 7"]


def test_no_mask_bounds_nothing():
    assert key_range(None) == Range()
    assert not Range().bounded
