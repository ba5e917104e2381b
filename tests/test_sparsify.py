"""The baselines of benchmarks/sparsify.py keep as much as what they are compared with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import harness
from sparsifying import losses, saved, times
from sparsifying.forms import FORMS, chance, grain, spec_of, visible, window

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


@pytest.mark.parametrize(
    "line",
    [
        "pooled_blocks(32, 16, share=0.3, first=1)",
        "block_topk(16, 3)",
        "pages(8, 4)",
        "(near_blocks(16, 1) | power_blocks(16) | global(16))",
        "(window(16) | global(4))",
    ],
)
def test_chance_visits_as_many_tiles(line):
    q, k, v = qkv()
    spec = spec_of(DENSE, line)
    random, operands = chance(spec, q, k, v)
    seen, chosen = attend(random, q, k, v, **operands).weights > 0, visible(spec, q, k, v)
    assert seen.any(-1).all()  # nobody is left without a key
    assert abs(float(seen.sum() / chosen.sum()) - 1) < 0.1  # tiles on the diagonal hold fewer pairs
    assert not torch.equal(seen, chosen)


def test_every_form_reads_back():
    assert all(spec_of(DENSE, form).special or form.startswith("(") for form in FORMS.values())
    assert grain(spec_of(DENSE, FORMS["Big Bird, 3 blocks of 32 by chance"])) == (32, 32)
    assert grain(spec_of(DENSE, FORMS["window 64, every 4th of 512"])) == (1, 1)


def test_a_run_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    kinds = {"losses": losses.ROW, "times": times.ROW}
    assert saved.read(kinds) == {"losses": [], "times": []}
    loss = losses.Loss("recall", 256, "moba", 0.5, 0.9, 0.1, 0.8, 0.2, 128, 0.2, 1e-3, 1e-4, 2e-3)
    found = {"losses": [loss], "times": [times.Time(8192, "dense", 0.4, 1.0, 1.0, 0.0)]}
    saved.save(found, ["1 thread"], "a table")
    assert saved.read(kinds) == found
    assert (tmp_path / "sparsify.md").read_text() == "a table"
    monkeypatch.setattr(losses, "subjects", lambda quick: [("recall", 256, None, [])])
    monkeypatch.setattr(losses, "FORMS", {"moba": "block_topk(64, 2)"})
    assert list(losses.rows(quick=False, done={loss.key})) == []
