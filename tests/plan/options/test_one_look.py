"""Edits made on one look at a graph are those that would be made one after the other; caches come and go as they would."""

from __future__ import annotations

from dataclasses import replace

import hf_models
import pytest
import torch
from decoding_models import step_of
from shrunk_models import host, output, rewritten

from attnopt.cost.target import load_target
from attnopt.passes import DropAttention, MeanPooling
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.one_look import on_one_look
from attnopt.plan.options.proposals import Move
from attnopt.plan.options.workshop import Workshop


def moves_in(given, *passes):
    """A move of each pass for a block after the other."""
    groups = Grouping(given).of("block")
    return [Move(p, g, p.propose(g, None)[0]) for p, g in zip(passes, groups, strict=True)]


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("passes", [(MeanPooling(), MeanPooling()), (DropAttention(), MeanPooling())], ids=["pooled", "dropped"])
def test_blocks_are_edited_on_one_look_as_one_after_the_other(kind, passes, monkeypatch):
    """The second layer reads what the first one gives: that must be what the first gives after its own edit."""
    given = host("turned", kind)
    moves = moves_in(given, *passes)
    left = iter(moves)

    def apply(group):
        move = next(left)
        move.rewrite.apply(move.candidate, group)

    wanted = rewritten(given, apply, blocks=(0, 0) if passes[0].name == "drop-attention" else (0, 1))
    looks = []
    real = Grouping.per_block
    monkeypatch.setattr(Grouping, "per_block", lambda self: looks.append(self) or real(self))
    shop = Workshop(given, {}, load_target("cpu")[0], "torch", 0, {})
    made = shop.edited(given.copy(), moves, {})
    assert len(looks) == 1
    assert torch.equal(output(made), output(wanted)) and not torch.equal(output(made), output(given))
    assert [s.name for s in Grouping(made).sites] == [s.name for s in Grouping(wanted).sites]
    products = [sum(n.op in ("linear", "matmul") for n in h.graph.nodes) for h in (made, wanted, given)]
    assert products[0] == products[1] and (products[2] - products[0] >= 4) == (passes[0].name == "drop-attention")  # none is kept


def test_what_is_no_edit_of_one_block_ends_a_run():
    given = host("turned", "torch")
    first, second = moves_in(given, MeanPooling(), MeanPooling())
    rounded = replace(first, candidate=replace(first.candidate, changes=("weights",)))
    assert list(on_one_look([first, second, rounded])) == [[second, first], [rounded]]
    assert list(on_one_look([first, rounded, second])) == [[first], [rounded], [second]]
    again = replace(first)
    assert list(on_one_look([first, again])) == [[first], [again]]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_caches_that_change_and_go_are_those_of_one_edit_after_the_other(kind):
    """Of three layers of a decoding step the second goes with its cache, the others share their heads and cache half as much."""
    ids, model = torch.arange(18).reshape(2, 9), hf_models.build("gpt2", "sdpa", layers=3)
    given = step_of(model, ids, kind)
    pooled = MeanPooling(groups=(2,))
    moves = moves_in(given, pooled, DropAttention(), pooled)
    assert list(on_one_look(moves)) == [[moves[1]], [moves[2], moves[0]]]
    made = Workshop(given, {}, load_target("cpu")[0], "torch", 0, {}).edited(given.copy(), moves, {})
    left = iter(moves)

    def apply(group):
        move = next(left)
        move.rewrite.apply(move.candidate, group)

    wanted = rewritten(given, apply, blocks=(0, 1, 1))
    assert [s.name for s in made.input_specs] == [s.name for s in wanted.input_specs] and len(made.input_specs) == 5
    x = {s.name: torch.randn(2, 2, 8, s.shape[3], generator=torch.Generator().manual_seed(0)) for s in made.input_specs[1:]}
    x[made.input_specs[0].name] = ids[:, -1:]
    for one, other in zip(made.runner()(x), wanted.runner()(x), strict=True):
        assert torch.equal(one, other)
    assert made.output_names == wanted.output_names and list(made.output_names) != list(given.output_names)
