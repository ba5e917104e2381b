"""Heads that are normalised: whole ones may go or be pooled before their norm, in both hosts; a change of basis does not pass through."""

from __future__ import annotations

import pytest
import torch
from shrunk_models import applied, evidence, host, output, rewritten
from shrunk_models import seen as seen_by

from attnopt.ir.block import HeadNorm
from attnopt.ir.site import Refusal
from attnopt.passes import EigenAttention, KeyNormGroups, MeanPooling, PruneHeads, WeightedGroups
from attnopt.passes.edits.heads.changes import HeadChanges, refuses_change
from attnopt.passes.edits.heads.head_map import HeadMap
from attnopt.passes.edits.heads.writer import write
from attnopt.passes.norm_nodes import refuses_norm
from attnopt.plan.options.groups import Grouping


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_all_heads_written_anew_are_what_they_were(kind):
    given = host("normed", kind)
    changes = HeadChanges(
        HeadMap.kept(range(4), 8), HeadMap.kept(range(2), 8), HeadMap.kept(range(2), 8), HeadMap.kept(range(4), 8)
    )
    made = rewritten(given, lambda group: write(group, changes))
    torch.testing.assert_close(output(made), output(given), atol=2e-5, rtol=2e-5)
    assert all(isinstance(b.k_norm, HeadNorm) and not b.missing for b in Grouping(made).blocks)


def test_heads_without_effect_go_and_heads_that_are_alike_are_pooled_without_loss():
    given = host("normed", "torch").copy()
    for block in Grouping(given).blocks:
        for layer in (block.k, block.v):
            given.set_constant(layer.weight, layer.rows()[:1].expand(2, -1, -1).reshape(layer.weight.shape).contiguous())
    given.finish()
    made = applied(MeanPooling(), None, given, "1 of 2 heads")
    torch.testing.assert_close(output(made), output(given), atol=2e-5, rtol=2e-5)
    given = host("normed", "torch").copy()
    block = Grouping(given).blocks[0]
    weight = block.o.matrix().clone()
    weight[:, block.o.channels[2:].flatten()] = 0
    given.set_constant(block.o.weight, weight.mT.contiguous() if block.o.transposed else weight)
    given.finish()
    less = applied(PruneHeads(shares=(0.5,)), seen_by(given), given, "without 1 of 2", [0])
    torch.testing.assert_close(output(less), output(given), atol=2e-5, rtol=2e-5)


def test_what_does_not_pass_through_the_norm_is_refused_by_name():
    group, found = Grouping(host("normed", "torch")).of("block")[0], evidence("normed", "torch")
    for rewrite, why in (
        (WeightedGroups(), "a weighted sum of heads"),
        (KeyNormGroups(), "the norm of keys by which groups differ"),
    ):
        refused = rewrite.propose(group, found)
        assert isinstance(refused, Refusal) and f"{why} does not pass through the norm" in refused.reason
    assert "a change of basis" in str(refuses_change(group)) and refuses_change(group, norms="") is None
    widths = [s for c in EigenAttention(thresholds=(0.5,), multiple=1).propose(group, found) for s in c.shapes.values()]
    assert widths and all(s["d"] == 8 and s["e"] < 8 for s in widths)


def test_norms_over_all_heads_and_gains_that_differ_are_refused():
    from dataclasses import replace

    step = Grouping(host("normed", "torch")).blocks[0].k_norm
    assert refuses_norm(step, "keys", "") is None
    assert "over all heads" in str(refuses_norm(replace(step, axis="all"), "keys", ""))
    assert "another gain in each head" in str(
        refuses_norm(replace(step, channels=torch.stack([torch.arange(8), torch.arange(8).flip(0)])), "keys", "")
    )
