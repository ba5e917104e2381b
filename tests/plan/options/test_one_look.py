"""Edits made on one look at a graph are those that would be made one after the other; what comes in or goes out is edited alone."""

from __future__ import annotations

from dataclasses import replace

import hf_models
import pytest
import torch
from shrunk_models import host, output, rewritten

from attnopt.cost.target import load_target
from attnopt.hosts.fx import FxHost, capture
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


def test_blocks_whose_keys_go_out_of_the_model_are_edited_alone():
    given = FxHost.from_captured(
        capture(hf_models.build("llama", "sdpa", layers=2), {"input_ids": torch.ones(2, 5, dtype=torch.long)})
    )
    assert len(given.graph.outputs) == 5  # and so are keys and values of either layer
    moves = moves_in(given, DropAttention(), DropAttention())
    assert list(on_one_look(moves)) == [[m] for m in moves]
