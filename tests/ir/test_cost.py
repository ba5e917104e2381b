"""Costs against counts by brute force."""

from __future__ import annotations

import pytest

from attnopt.ir.cost import cost, visible_fraction
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.spec import parse

SHAPE = {"b": 2, "h": 8, "g": 2, "q": 64, "k": 64, "d": 16, "e": 32}


@pytest.mark.parametrize(
    "mask",
    ["causal", "causal & window(7)", "causal & (window(5) | global(3))", "window(9) & lookahead(4)", "~causal", "chunk(16)"],
)
@pytest.mark.parametrize(("q", "k"), [(64, 64), (33, 70), (512, 512)])
def test_visible_fraction_is_the_count(mask, q, k):
    expr = parse(f"softmax {mask}").mask
    counted = sum(bool(x) for x in evaluate(expr, Grid(1, 1, q, k)).expand(1, 1, q, k).flatten()) / (q * k)
    assert visible_fraction(expr, q, k) == pytest.approx(counted)


def test_long_masks_are_sampled_closely():
    expr = parse("softmax causal").mask
    assert visible_fraction(expr, 8192, 8192) == pytest.approx(0.5, abs=2e-3)


def test_data_counts_as_visible_also_under_a_negation():
    assert visible_fraction(parse("softmax load(m, b, k)").mask, 8, 8) == 1.0
    assert visible_fraction(parse("softmax ~load(m, b, k)").mask, 8, 8) == 1.0
    assert visible_fraction(parse("softmax causal & ~load(m, b, k)").mask, 8, 8) == pytest.approx(36 / 64)
    assert visible_fraction(parse("softmax causal & padding").mask, 8, 8) == pytest.approx(36 / 64)


def test_products_dominate_and_count_twice():
    plain = cost("softmax", SHAPE)
    pairs = 2 * 8 * 64 * 64
    assert plain.flops == pairs * (2 * (16 + 32) + 5)
    assert cost("softmax causal", SHAPE).flops == pytest.approx(plain.flops * 65 / 128)
    assert cost("softmax scale(0.5) softcap(50.0)", SHAPE).flops == plain.flops + pairs * 4


def test_bytes_read_grouped_heads_once():
    assert cost("softmax", SHAPE).bytes == 4 * 2 * (8 * 64 * 48 + 2 * 64 * 48)
    assert cost("softmax", SHAPE, "bfloat16").bytes == cost("softmax", SHAPE).bytes / 2
    assert cost("softmax cache(k=int8, v=int4)", SHAPE, "float16").bytes == 2 * (8 * 64 * 48 * 2 + 2 * 64 * (16 + 32 * 0.5))


def test_a_selection_bounds_the_pairs():
    assert cost("softmax top_keys(4)", SHAPE).flops == pytest.approx(cost("softmax", SHAPE).flops * 4 / 64)
    assert cost("softmax block_topk(2, 8)", SHAPE).flops == pytest.approx(cost("softmax", SHAPE).flops * 16 / 64)
    assert cost("softmax top_keys(1000)", SHAPE).flops == cost("softmax", SHAPE).flops


def test_linear_attention_grows_with_length_only_once():
    short, long = cost("linear(elu1)", SHAPE), cost("linear(elu1)", {**SHAPE, "q": 640, "k": 640})
    assert long.flops == pytest.approx(10 * short.flops)
    assert long.working_set == short.working_set
    assert cost("softmax", {**SHAPE, "q": 640, "k": 640}).flops == pytest.approx(100 * cost("softmax", SHAPE).flops)
