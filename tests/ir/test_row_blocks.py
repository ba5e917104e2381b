"""The reference in blocks of rows is the reference: every clause that is computed in blocks, and those that cannot be."""

from __future__ import annotations

import pytest
import torch

from attnopt.errors import InputMismatch
from attnopt.ir.reference import attend
from attnopt.ir.row_blocks import attended, row_local
from attnopt.ir.spec import parse

BATCH, HEADS, KEY_HEADS, QUERIES, KEYS, WIDTH = 2, 4, 2, 7, 11, 8
LOCAL = [
    "softmax scale(0.25)",
    "softmax scale(0.25) causal & window(4)",
    "softmax offset(size(k) - size(q)) scale(0.25) causal & window(4)",
    "softmax scale(0.25) softcap(3.0) add(load(bias, b, h, row, k)) causal",
    "softmax scale(0.25) add((k - q) * 0.5 * (1 + h)) offset(size(k) - size(q)) causal",
    "softmax scale(0.25) load(seen, b, row, k) empty(zero)",
    "softmax scale(0.25) load(seen, b, row, k)",
    "softmax norm(l2) rotary(8, base=100.0) offset(4) scale(2.0) causal",
    "softmax scale(0.25) (q - k < size(q)) sink(0.5)",
    "softmax scale(0.25) causal gate(0.5 + row)",
    "sigmoid scale(0.25) add(-2.0) causal",
    "zscore scale(0.25) causal",
    "signed_softmax scale(0.25)",
    "softmax scale(0.25) cache(k=int4, v=int4, recent=3)",
]
WHOLE = {
    "softmax scale(0.25) precision(q=int8, k=int8, q_group=row // 2)": "precision",
    "softmax norm(longest) scale(0.25)": "norm(longest) reads more than one row",
    "sinkhorn(3) scale(0.25)": "sinkhorn",
    "softmax scale(0.25) plus(0.5, softmax scale(1.0))": "plus",
    "linear(elu1, reweigh=mean_query)": "linear",
}


@pytest.fixture
def given():
    q = torch.randn(BATCH, HEADS, QUERIES, WIDTH, dtype=torch.float64)
    k, v = (torch.randn(BATCH, KEY_HEADS, KEYS, WIDTH, dtype=torch.float64) for _ in "kv")
    seen = torch.rand(BATCH, QUERIES, KEYS) > 0.6
    seen[0, 2] = False  # a query that sees no key
    return q, k, v, {"bias": torch.randn(BATCH, HEADS, QUERIES, KEYS), "seen": seen}


def check(line, given, elements):
    q, k, v, operands = given
    spec = parse(line)
    whole = attend(spec, q, k, v, **operands)
    blocks = list(attended(spec, q, k, v, operands, elements=elements))
    torch.testing.assert_close(torch.cat([b.weights for b in blocks], 2), whole.weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([b.output for b in blocks], 2), whole.output, rtol=1e-12, atol=1e-12)
    return blocks


@pytest.mark.parametrize("line", LOCAL)
def test_blocks_are_the_reference(line, given):
    assert row_local(parse(line)) == ""
    one_row = BATCH * HEADS * KEYS
    assert [b.first for b in check(line, given, one_row * 3)] == [0, 3, 6]
    assert len(check(line, given, 1)) == QUERIES  # never less than a row
    assert len(check(line, given, 10**9)) == 1


@pytest.mark.parametrize("line", WHOLE)
def test_what_reads_more_than_a_row_comes_whole(line, given):
    assert WHOLE[line] in row_local(parse(line))
    assert len(check(line, given, 1)) == 1


def test_positions_count_the_past(given):
    q, k, v, operands = given
    blocks = list(attended(parse("softmax offset(4) causal"), q, k, v, operands, elements=BATCH * HEADS * KEYS * 4))
    assert [b.positions.flatten().tolist() for b in blocks] == [[4, 5, 6, 7], [8, 9, 10]]
    assert [b.visible.shape[2] for b in blocks] == [4, 3]


def test_lengths_by_name_and_wrong_shapes(given):
    q, k, v, operands = given
    line = "softmax (k < size(past))"
    blocks = list(attended(parse(line), q, k, v, operands, sizes={"past": 3}, elements=1))
    assert all(int(b.visible.sum(-1).max()) == 3 for b in blocks)
    with pytest.raises(InputMismatch, match="q and k differ in width"):
        list(attended(parse(line), q[..., :4], k, v, operands))
