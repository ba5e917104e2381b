"""Visited blocks against the mask itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.grammar import parse_expr
from attnopt.ir.visits import visited_pairs

MASKS = [
    "causal", "causal & window(7)", "causal & (window(5) | global(3))", "window(9) & lookahead(4)", "chunk(16)", "q - k < 5",
    "causal & padding", "near_blocks(8, 1)",
]  # fmt: skip
SPARSE = ["dilated(3) & causal", "power_blocks(8)", "row % 16 == 0"]


def counted(mask, q, k, offset, rows, keys):
    """Every pair of every block that shows something, by brute force; padding shows all."""
    seen = evaluate(parse_expr(mask.replace(" & padding", "")), Grid(1, 1, q, k, offset)).expand(1, 1, q, k)[0, 0]
    blocks = [seen[i : i + rows, j : j + keys] for i in range(0, q, rows) for j in range(0, k, keys)]
    return sum(block.numel() for block in blocks if block.any())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("q", "k", "offset", "rows", "keys"), [(64, 64, 0, 16, 8), (33, 70, 0, 8, 16), (20, 70, 50, 16, 16), (40, 40, 0, 1, 1)]
)
def test_bounds_count_exactly(mask, q, k, offset, rows, keys):
    assert visited_pairs(parse_expr(mask), q, k, offset, rows, keys) == counted(mask, q, k, offset, rows, keys)


@pytest.mark.parametrize("mask", SPARSE)
def test_what_is_no_bound_is_looked_at(mask):
    assert visited_pairs(parse_expr(mask), 64, 64, 0, 8, 8) == counted(mask, 64, 64, 0, 8, 8)
    assert visited_pairs(parse_expr(mask), 64, 64) == counted(mask, 64, 64, 0, 1, 1)


def test_nothing_to_see_and_nothing_hidden():
    assert visited_pairs(None, 7, 9) == visited_pairs(parse_expr("padding"), 7, 9, 0, 4, 4) == 63
    assert visited_pairs(parse_expr("causal"), 0, 9) == 0
    assert visited_pairs(parse_expr("causal"), 1024, 1024, 0, 128, 128) == 36 * 128**2


@given(
    q=st.integers(1, 60), k=st.integers(1, 60), w=st.integers(1, 60), more=st.integers(0, 20), rows=st.integers(1, 16),
    keys=st.integers(1, 16),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_more_visible_keys_are_never_fewer_visits(q, k, w, more, rows, keys):
    narrow, wide = (visited_pairs(parse_expr(f"causal & window({n})"), q, k, 0, rows, keys) for n in (w, w + more))
    assert narrow <= wide <= visited_pairs(parse_expr("causal"), q, k, 0, rows, keys) <= q * k
    assert visited_pairs(parse_expr(f"causal & window({w})"), q, k) <= narrow
