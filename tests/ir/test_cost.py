"""Costs against counts by brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.ir import cost as costs
from attnopt.ir.cost import cost, visible_fraction
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.spec import parse

SHAPE = {"b": 2, "h": 8, "g": 2, "q": 64, "k": 64, "d": 16, "e": 32}
MASKS = [
    "causal",
    "causal & window(7)",
    "causal & (window(5) | global(3))",
    "window(9) & lookahead(4)",
    "~causal",
    "chunk(16)",
    "last_query(9) | row < size(q) // 2",
]


def counted(mask: str, q: int, k: int, offset: int = 0) -> int:
    expr = parse(f"softmax {mask}").mask
    return sum(map(bool, evaluate(expr, Grid(1, 1, q, k, offset)).expand(1, 1, q, k).flatten().tolist()))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("q", "k"), [(64, 64), (33, 70), (1, 70), (512, 512)])
def test_visible_fraction_is_the_count(mask, q, k):
    assert visible_fraction(parse(f"softmax {mask}").mask, q, k) == pytest.approx(counted(mask, q, k) / (q * k))


@given(q=st.integers(1, 40), k=st.integers(1, 40), offset=st.integers(0, 40), w=st.integers(1, 40), n=st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_windows_and_globals_at_any_offset(q, k, offset, w, n):
    mask = f"causal & (window({w}) | global({n}))"
    assert visible_fraction(parse(f"softmax {mask}").mask, q, k, offset) * q * k == pytest.approx(counted(mask, q, k, offset))


@pytest.mark.parametrize("mask", ["causal", "causal & window(100)", "row < 400", "q >= size(q) - 300"])
@pytest.mark.parametrize("length", [513, 1000, 1023, 1500])
def test_long_masks_are_sampled_closely(mask, length):
    exact = counted(mask, length, length) / length**2
    assert visible_fraction(parse(f"softmax {mask}").mask, length, length) == pytest.approx(exact, abs=2e-3)


def test_long_masks_visit_few_rows_and_pairs_at_a_time(monkeypatch):
    visited = []

    def watched(expr, grid):
        visited.append((len(range(0, grid.q_len, grid.q_step)), grid.kv_len))
        return evaluate(expr, grid)

    monkeypatch.setattr(costs, "evaluate", watched)
    assert visible_fraction(parse("softmax causal").mask, 70_001, 70_001) == pytest.approx(0.5, abs=1e-4)
    assert sum(rows for rows, _ in visited) <= costs.ROWS
    assert max(rows * keys for rows, keys in visited) <= costs.PAIRS


def test_what_is_not_known_counts_as_visible_also_under_a_negation():
    def seen(mask):
        return visible_fraction(parse(f"softmax {mask}").mask, 8, 8)

    assert seen("load(m, b, k)") == seen("~load(m, b, k)") == seen("document") == 1.0
    assert seen("causal & ~load(m, b, k)") == seen("causal & padding") == pytest.approx(36 / 64)
    assert seen("h >= 2") == seen("b == 1 | k < size(sentences)") == 1.0
    assert seen("causal & ~(h < 2)") == pytest.approx(36 / 64)


def test_an_unknown_offset_puts_the_queries_last():
    shape = {**SHAPE, "q": 1}
    last = cost("softmax causal & window(8) offset(size(k) - size(q))", shape)
    assert cost("softmax causal & window(8) offset(load(past))", shape) == last
    assert cost("softmax causal & window(8) offset(size(past))", shape) == last
    assert last.flops == 2 * 8 * 8 * (2 * (16 + 32) + 5)


def test_products_dominate_and_count_twice():
    plain = cost("softmax", SHAPE)
    pairs = 2 * 8 * 64 * 64
    assert plain.flops == pairs * (2 * (16 + 32) + 5)
    assert plain.working_set == 64 * 64 * 4
    assert cost("softmax causal", SHAPE).flops == pytest.approx(plain.flops * 65 / 128)
    assert cost("softmax scale(0.5) softcap(50.0)", SHAPE).flops == plain.flops + pairs * 4


def test_bytes_read_grouped_heads_once():
    assert cost("softmax", SHAPE).bytes == 4 * 2 * (8 * 64 * 48 + 2 * 64 * 48)
    assert cost("softmax", SHAPE, "bfloat16").bytes == cost("softmax", SHAPE).bytes / 2


def test_bytes_follow_the_cache_then_the_precision():
    q, o, k, v = 8 * 64 * 16, 8 * 64 * 32, 2 * 64 * 16, 2 * 64 * 32
    assert cost("softmax cache(k=int8, v=int4)", SHAPE, "float16").bytes == 2 * (2 * q + 2 * o + k + v / 2)
    assert cost("softmax precision(q=int8, k=int4)", SHAPE, "float16").bytes == 2 * (q + 2 * o + k / 2 + 2 * v)
    assert cost("softmax precision(k=int4) cache(k=int8, v=int8)", SHAPE, "float16").bytes == 2 * (2 * (q + o) + k + v)


def test_a_selection_bounds_the_pairs():
    plain = cost("softmax", SHAPE).flops
    assert cost("softmax top_keys(4)", SHAPE).flops == pytest.approx(plain * 4 / 64)
    assert cost("softmax block_topk(2, 8)", SHAPE).flops == pytest.approx(plain * 16 / 64)
    assert cost("softmax pages(3, 8)", SHAPE).flops == pytest.approx(plain * 24 / 64)
    assert cost("softmax top_keys(1000)", SHAPE).flops == plain
    early = torch.arange(1, 65).clamp(max=4).sum().item()  # the first queries see fewer keys than may be selected
    assert cost("softmax causal top_keys(4)", SHAPE).flops == pytest.approx(plain * early / 64**2)


def test_linear_attention_grows_with_length_only_once():
    longer = {**SHAPE, "q": 640, "k": 640}
    for line in ("linear(elu1)", "recurrent"):
        short, long = cost(line, SHAPE), cost(line, longer)
        assert long.flops == pytest.approx(10 * short.flops)
        assert long.working_set == short.working_set
    assert cost("softmax", longer).flops == pytest.approx(100 * cost("softmax", SHAPE).flops)


def test_added_attentions_are_paid_too():
    both = cost("softmax window(8) plus(1.0, linear(elu1))", SHAPE)
    first, second = cost("softmax window(8)", SHAPE), cost("linear(elu1)", SHAPE)
    assert both.flops == first.flops + second.flops
    assert both.bytes == first.bytes + second.bytes
    assert both.working_set == max(first.working_set, second.working_set)
