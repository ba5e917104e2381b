"""Groups by key norm: shares add up, equal norms give equal shares, an uneven model is computed as its heads repeated."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shrunk_models import applied, evidence, host, output

from attnopt.passes import KeyNormGroups
from attnopt.passes.heads.key_norm_groups import shares
from attnopt.plan.options.groups import Grouping


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=8), st.integers(1, 4))
def test_shares_add_up_and_nobody_gets_none(norms, each):
    found = shares(norms, each * len(norms))
    assert sum(found) == each * len(norms) and min(found) >= 1


def test_shares_follow_the_norms():
    assert shares([5.0, 5.0], 8) == [4, 4]
    assert shares([1.0, 3.0], 8) == [1, 7]
    assert shares([0.0, 1.0, 3.0], 8) == [1, 2, 5]


def test_an_uneven_model_reads_each_key_head_as_often_as_its_share_says():
    model, found = host("packed", "torch"), evidence("packed", "torch")
    offers = KeyNormGroups(groups=(2,)).propose(Grouping(model).of("block")[0], found)
    assert offers[0].options["reads"] in ([0, 1, 1, 1], [0, 0, 0, 1])
    made = applied(KeyNormGroups(groups=(2,)), found, model, "2 of 4 heads", [0])
    by_hand = model.copy()
    (block, _) = Grouping(by_hand).blocks
    weight, bias = block.k.matrix().clone(), (block.k.bias.load().clone() if block.k.bias is not None else None)
    for layer in (block.k, block.v):
        pooled = torch.stack([layer.rows()[:2].mean(0), layer.rows()[2:].mean(0)])[offers[0].options["reads"]]
        weight[layer.channels] = pooled
        if bias is not None:
            bias[layer.channels] = torch.stack([bias[layer.channels][:2].mean(0), bias[layer.channels][2:].mean(0)])[
                offers[0].options["reads"]
            ]
    by_hand.set_constant(block.k.weight, weight.mT.contiguous() if block.k.transposed else weight)
    if bias is not None:
        by_hand.set_constant(block.k.bias, bias)
    by_hand.finish()
    torch.testing.assert_close(output(made), output(by_hand), atol=2e-5, rtol=2e-5)
