"""Bands are proved: no visible key lies outside, and what follows the distance alone is the same along every diagonal."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnopt.ir.band import Band, band, follows_distance
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Expr, apply, conjunction, conjuncts
from attnopt.ir.grammar import parse_expr

KNOWN = {
    "causal & window(512) & padding": Band(511, 0),
    "k > q - 16 & k - q <= 4": Band(15, 4),
    "chunk(64) & causal": Band(63, 0, 64),
    "causal & window(9) & q - k < 2": Band(1, 0),
    "window(4) & lookahead(3)": Band(3, 2),
    "near_blocks(4, 1)": Band(7, 7),
    "diagonal": Band(0, 0),
    "q < k + 5 & causal": Band(4, 0),
    "causal & window(0)": Band(0, 0),
    "causal & (window(3) | global(2))": Band(2, 0, first=2),
    "(k <= 6 | q - k < 4 | window(2)) & causal": Band(3, 0, first=7),
    "(5 > k | window(4) & lookahead(3)) & padding": Band(3, 2, first=5),
    "(window(9) | global(2)) & causal & (window(4) | global(3))": Band(3, 0, first=3),
    "causal & window(6) & (window(3) | global(2))": Band(5, 0),
}
UNKNOWN = [
    "causal",
    "window(4)",
    "causal & (window(3) | k > 2)",
    "causal & (global(3) | global(2))",
    "window(3) | global(2)",
    "k < 9",
    "causal & dilated(2)",
    "2 * q - 2 * k < 3 & causal",
]


@pytest.mark.parametrize("text", KNOWN)
def test_known_bands(text):
    assert band(parse_expr(text)) == KNOWN[text]


@pytest.mark.parametrize("text", UNKNOWN)
def test_no_band(text):
    assert band(parse_expr(text)) is None


def test_no_mask():
    assert band(None) is None


SIDES = st.integers(-4, 9)
PARTS = st.one_of(
    st.builds(lambda w: parse_expr(f"window({w})"), st.integers(0, 9)),
    st.builds(lambda w: parse_expr(f"lookahead({w})"), st.integers(0, 9)),
    st.builds(lambda n: parse_expr(f"chunk({n})"), st.integers(1, 9)),
    st.builds(lambda n, w: parse_expr(f"near_blocks({n}, {w})"), st.integers(1, 5), st.integers(0, 2)),
    st.sampled_from([parse_expr(t) for t in ("causal", "diagonal", "dilated(2)", "global(3)", "k != q", "-q < -k + 2")]),
    st.builds(lambda op, a, c: apply(op, *reversed_if(c < 0, parse_expr(f"q - {a}"), parse_expr(f"k + {abs(c)}"))),
              st.sampled_from(["lt", "le", "gt", "ge", "eq"]), st.integers(0, 9), SIDES),
)  # fmt: skip


def reversed_if(turned: bool, a: Expr, b: Expr) -> tuple[Expr, Expr]:
    return (b, a) if turned else (a, b)


ALTERNATIVES = st.lists(PARTS, min_size=2, max_size=3).map(lambda parts: functools.reduce(lambda a, b: apply("or", a, b), parts))


@given(st.lists(st.one_of(PARTS, ALTERNATIVES), min_size=1, max_size=4))
def test_no_visible_key_lies_outside(parts):
    mask = conjunction(*parts)
    found = band(mask)
    if found is None:
        return
    visible = evaluate(mask, Grid(1, 1, 24, 24)).expand(1, 1, 24, 24)[0, 0].nonzero()
    distance = visible[:, 0] - visible[:, 1]
    beyond = visible[:, 1] >= found.first
    assert bool((distance <= found.behind)[beyond].all()) and bool((-distance <= found.ahead)[beyond].all())
    if found.block is not None:
        assert torch.equal(visible[:, 0] // found.block, visible[:, 1] // found.block)


@given(st.lists(PARTS, min_size=1, max_size=3))
def test_what_follows_the_distance_is_equal_along_diagonals(parts):
    for part in conjuncts(conjunction(*parts)):
        if follows_distance(part):
            here = evaluate(part, Grid(1, 1, 12, 12)).expand(1, 1, 12, 12)[0, 0]
            there = evaluate(part, Grid(1, 1, 24, 24)).expand(1, 1, 24, 24)[0, 0, 12:, 12:]
            assert torch.equal(here, there)


@pytest.mark.parametrize("text", ["alibi", "load(slopes, h) * abs(k - q)", "dilated(3)", "load(bias, h)", "size(k) - 1"])
def test_follows_distance(text):
    assert follows_distance(parse_expr(text))


@pytest.mark.parametrize("text", ["padding", "document", "q + k < 3", "k + (q - k)", "chunk(3)", "row - k"])
def test_follows_more_than_distance(text):
    assert not follows_distance(parse_expr(text))
