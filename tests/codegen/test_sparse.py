"""Sparse attention put together from kernels is the spec's own meaning; here the reference stands for every kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ir.operands import close

from attnopt.codegen import listed
from attnopt.codegen.sparse import kernels, refuses, run_sparse
from attnopt.ir.reference import reference
from attnopt.ir.spec import parse


def qkv(length=70, heads=4, key_heads=2, width=8, seed=0):
    made = torch.Generator().manual_seed(seed)
    shapes = ((1, heads, length, width), (1, key_heads, length, width), (1, key_heads, length, width))
    return tuple(torch.randn(s, generator=made, dtype=torch.float64).cumsum(2) / 3 for s in shapes)


def exactly(spec, q, k, v, operands):
    return reference(spec, q, k, v, **{name: operands[name] for name in spec.operands})


LINES = [
    "softmax scale(0.3) causal pooled_blocks(16, 8, mass=0.8, similarity=0.5, first=1)",
    "softmax scale(0.3) pooled_blocks(16, 8, share=0.4, similarity=0.0, first=1)",
    "softmax scale(0.3) causal pooled_blocks(16, 8, mass=2.0, first=1, skip=1.0, skip_rows=8)",
    "softmax scale(0.3) causal block_topk(8, 3)",
    "softmax scale(0.3) causal block_topk(16, 2, rows=16)",
    "softmax scale(0.3) causal & (near_blocks(4, 1) | power_blocks(4) | global(4))",
    "softmax scale(0.3) causal & (near_blocks(4, 1) | causal_random_blocks(4, 1, 2, 9) | global(4))",
    "softmax scale(0.3) causal & dilated(3)",
    "softmax scale(0.3) causal & (window(8) | global(2)) delta(8, dense=causal, tail=10)",
    "softmax scale(0.3) causal pooled_blocks(16, 8, share=0.4, similarity=0.0, first=1) delta(8, tail=8)",
    "softmax scale(0.3) causal block_topk(8, 2) delta(4, tail=0)",
    "softmax scale(0.3) causal & document & dilated(3)",
    "softmax scale(0.3) causal & document pooled_blocks(16, 8, share=0.4, similarity=0.0, first=1)",
    "softmax scale(0.3) causal & document block_topk(8, 2)",
    "softmax scale(0.3) add(load(slopes, h) * (k - q)) causal & window(9) delta(8, dense=causal, tail=8)",
]


@pytest.mark.parametrize("line", LINES)
def test_what_is_put_together_is_the_meaning(line):
    spec = parse(line)
    assert refuses(spec) is None
    assert all("blocks(" in str(s) or s.selection is None for s in kernels(spec))
    q, k, v = qkv()
    operands = {"slopes": torch.linspace(0.1, 1, 4, dtype=torch.float64), "document": torch.arange(70)[None] // 27}
    operands = {name: x for name, x in operands.items() if name in line}
    got = run_sparse(exactly, spec, q, k, v, operands)
    close(got, reference(spec, q, k, v, **operands))
    assert (
        not torch.allclose(got, reference(spec.with_(selection=None, correction=None), q, k, v, **operands)) or not spec.special
    )


@pytest.mark.parametrize(
    ("mask", "left"),
    [
        ("causal & (near_blocks(64, 1) | power_blocks(128) | global(64))", "causal"),
        ("causal & (near_blocks(64, 1) | global(4))", "causal & (near_blocks(64, 1) | global(4))"),
        ("causal & chunk(96)", "causal & chunk(96)"),
        ("k >= 64 & q // 64 != k // 64", None),
        ("dilated(64)", "dilated(64)"),
    ],
)
def test_what_tiles_say_is_not_asked_again(mask, left):
    spec = parse(f"softmax scale(0.3) {mask}")
    found = listed.listed(spec)
    assert left == (None if found.mask is None else str(found.mask))
    q, k, v = qkv(150, 2, 1)
    close(listed.run_listed(exactly, spec, q, k, v, {}), reference(spec, q, k, v))


def test_every_row_dense_is_dense():
    q, k, v = qkv()
    for line in LINES:
        spec = parse(line.replace("delta(8", "delta(1").replace("delta(4", "delta(1"))
        if spec.correction is not None and not spec.operands:
            close(run_sparse(exactly, spec, q, k, v, {}), reference("softmax scale(0.3) causal", q, k, v))


def test_the_correction_helps_where_neighbours_lose_alike():
    """Rows that drift: what a window leaves out of one row is nearly what it leaves out of the next."""
    q, k, v = qkv(120)
    dense = reference("softmax scale(0.3) causal", q, k, v)
    line = "softmax scale(0.3) causal & (window(16) | global(2))"
    plain, shifted = (reference(x, q, k, v) - dense for x in (line, f"{line} delta(8, dense=causal, tail=8)"))
    assert shifted[:, :, :100].norm() < 0.7 * plain[:, :, :100].norm()


SELECTORS = [line for line in LINES if "causal" in line and "document" not in line]


@settings(max_examples=8, deadline=None)
@given(line=st.sampled_from(SELECTORS), cut=st.integers(1, 39), seed=st.integers(0, 9))
def test_no_query_gives_weight_to_a_later_key(line, cut, seed):
    """Values after a query never reach it, whoever chose; where queries choose alone, nor do later keys and queries."""
    q, k, v = qkv(40, 2, 1, seed=seed)
    operands = {"slopes": torch.tensor([0.1, 1.0], dtype=torch.float64)} if "slopes" in line else {}
    before = run_sparse(exactly, parse(line), q, k, v, operands)[:, :, :cut]
    later = v.clone()
    later[:, :, cut:] += 100
    close(run_sparse(exactly, parse(line), q, k, later, operands)[:, :, :cut], before)
    if "pooled" not in line and "rows=" not in line:
        others = (x.clone() for x in (q, k, later))
        q, k, later = (torch.cat([x[:, :, :cut], -3 * x[:, :, cut:]], 2) for x in others)
        close(run_sparse(exactly, parse(line), q, k, later, operands)[:, :, :cut], before)


@pytest.mark.parametrize(("empty", "wanted"), [("empty(zero)", 0.0), ("", None)])
def test_a_query_that_no_tile_shows_a_key_follows_the_rule(empty, wanted):
    q, k, v = qkv()
    tiles = torch.ones(1, 1, 5, 9, dtype=torch.bool)
    tiles[:, :, 1] = False
    made = reference(parse(f"softmax scale(0.3) blocks(16, 8, operand=t) {empty}"), q, k, v, t=tiles)[:, :, 16:32]
    mean = v.mean(2, keepdim=True).repeat_interleave(2, 1).expand_as(made)
    close(made, torch.zeros_like(made) if wanted == 0.0 else mean)


def test_refusals():
    for line, why in (
        ("softmax causal", "no tile is left out but by bounds"),
        ("softmax causal & window(8)", "no tile is left out but by bounds"),
        ("softmax causal & padding", "no tile is left out but by bounds"),
        ("softmax causal blocks(64, 64)", "is a list already"),
        ("softmax causal top_keys(4) delta(8)", "chooses single keys"),
        ("softmax offset(4) causal delta(8)", "only a whole prompt"),
        ("softmax causal & k > size(q) - 4 delta(8)", "reads the number of queries"),
    ):
        found = refuses(parse(line))
        assert found is not None and why in found.reason, line
