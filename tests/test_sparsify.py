"""The baselines of benchmarks/sparsify.py keep as much as what they are compared with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from sparse.forms import FORMS, chance, spec_of, visible, window

from attnopt.ir.reference import attend
from attnopt.ir.spec import parse

DENSE = parse("softmax scale(0.3) causal")


def qkv():
    made = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, h, 200, 8, generator=made).cumsum(2) / 4 for h in (2, 1, 1))


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_window_shows_as_many_pairs(kept):
    q, k, v = qkv()
    width = window(200, kept)
    pairs = [int(visible(spec_of(DENSE, f"window({w})"), q, k, v)[0, 0].sum()) for w in (width - 1, width)]
    assert pairs[0] < kept * 200 * 201 / 2 <= pairs[1]


@pytest.mark.parametrize("line", ["pooled_blocks(32, 16, share=0.3, first=1)", "block_topk(16, 3)", "pages(8, 4)"])
def test_chance_visits_as_many_tiles(line):
    q, k, v = qkv()
    spec = spec_of(DENSE, line)
    made = chance(spec, q, k, v)
    assert made is not None
    random, operands = made
    seen, chosen = attend(random, q, k, v, **operands).weights > 0, visible(spec, q, k, v)
    assert seen.any(-1).all()  # nobody is left without a key
    assert abs(float(seen.sum() / chosen.sum()) - 1) < 0.1  # tiles on the diagonal hold fewer pairs
    assert not torch.equal(seen, chosen)


def test_every_form_reads_back():
    assert all(spec_of(DENSE, form).special or form.startswith("(") for form in FORMS.values())
    assert chance(spec_of(DENSE, "window(4)"), *qkv()) is None
