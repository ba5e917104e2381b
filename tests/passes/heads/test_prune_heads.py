"""Heads that are left out: those without effect first, whole groups of queries, and an output projection fitted to what is left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from shrunk_models import IDS, evidence, host, output, rewritten

from attnopt.errors import OutOfRange
from attnopt.ir.site import Refusal
from attnopt.passes import PruneHeads
from attnopt.passes.edits.heads.writer import write
from attnopt.passes.heads.prune_heads import output_moment, pruned
from attnopt.plan.options.groups import Grouping

from shrunk_models import seen as seen_by  # isort: skip


@pytest.mark.parametrize("family", ["packed", "turned"])
def test_a_head_without_effect_goes_first_and_changes_nothing(family):
    given = host(family, "torch").copy()
    block = Grouping(given).blocks[0]
    repeats = len(block.o.channels) // len(block.k.channels)
    weight = block.o.matrix().clone()
    weight[:, block.o.channels[repeats : 2 * repeats].flatten()] = 0  # key head 1 with its queries
    given.set_constant(block.o.weight, weight.mT.contiguous() if block.o.transposed else weight)
    given.finish()
    found = seen_by(given)
    heads = len(block.k.channels)
    offers = PruneHeads(shares=(1 / heads,)).propose(Grouping(given).of("block")[0], found)
    assert [c.kind for c in offers] == [f"without 1 of {heads}", f"without 1 of {heads}, fitted"]
    assert [c.needs for c in offers] == ["calibration", "tuning"] and 1 not in offers[0].options["kept"]
    made = rewritten(given, lambda group: PruneHeads().apply(offers[0], group), [0])
    torch.testing.assert_close(output(made), output(given), atol=2e-5, rtol=2e-5)
    assert Grouping(made).sites[0].size("h") == 4 - repeats


def test_the_fitted_output_is_nearer_to_what_all_heads_gave():
    given, found = host("packed", "torch"), evidence("packed", "torch")
    group = Grouping(given).of("block")[0]
    rewrite = PruneHeads(shares=(0.5,))
    plain, fitted = rewrite.propose(group, found)
    tuned = replace(fitted, arrays=rewrite.arrays(rewrite.tune(fitted, group, found), group, found))
    end = group.blocks[0].residual.node.output
    lost = []
    for candidate in (plain, tuned):
        made = rewritten(given, lambda g, c=candidate: rewrite.apply(c, g), [0])
        twin = Grouping(made).blocks[0].residual.node.output
        (wanted,), (got,) = given.tap([end], {"input_ids": IDS}), made.tap([twin], {"input_ids": IDS})
        lost.append(float((wanted - got).norm()))
    assert lost[1] < lost[0]


def test_all_heads_kept_and_fitted_is_the_identity():
    given, found = host("packed", "torch"), evidence("packed", "torch")
    seen = output_moment(Grouping(given).of("block")[0], found)
    made = rewritten(given, lambda g: write(g, pruned(g.blocks[0], range(4), seen)), [0])
    assert float((output(made) - output(given)).norm() / output(given).norm()) < 1e-2


def test_what_cannot_be_is_refused():
    assert isinstance(PruneHeads().propose(Grouping(host("packed", "torch")).of("block")[0], None), Refusal)
    with pytest.raises(OutOfRange, match="in \\[0, 1\\)"):
        PruneHeads(shares=(1.0,))
