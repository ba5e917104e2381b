"""Mean pooling: groups = heads is the identity, identical heads lose nothing, group counts out of range name the allowed ones."""

from __future__ import annotations

import pytest
import torch
from shrunk_models import applied, host, output, rewritten

from attnopt.errors import OutOfRange
from attnopt.ir.site import Refusal
from attnopt.passes import MeanPooling
from attnopt.passes.heads.mean_pooling import spread
from attnopt.plan.options.groups import Grouping


def test_as_many_groups_as_heads_is_the_identity():
    given = host("packed", "torch")
    made = applied(MeanPooling(groups=(4,)), None, given, "4 of 4 heads")
    torch.testing.assert_close(output(made), output(given), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("family", "heads", "kind"), [("packed", 4, "torch"), ("turned", 2, "torch"), ("packed", 4, "onnx")])
def test_pooled_heads_are_the_mean_and_the_spec_says_groups(family, heads, kind):
    given = host(family, kind)
    made = applied(MeanPooling(), None, given, f"1 of {heads} heads")
    before, after = Grouping(given), Grouping(made)
    assert [str(s.spec.heads) for s in after.sites] == ["heads(4, 1)"] * 2
    for old, new in zip(before.blocks, after.blocks, strict=True):
        for side in "kv":
            wanted = old.projections(side)[0].rows().mean(0, keepdim=True)
            torch.testing.assert_close(new.projections(side)[0].rows(), wanted)
    assert float((output(made) - output(given)).norm()) > 1e-2


def test_heads_that_are_turned_only_are_pooled_without_loss_when_aligned():
    given = host("packed", "torch").copy()
    for block in Grouping(given).blocks:
        weight = block.k.matrix().clone()
        for layer in (block.k, block.v):
            for h in range(4):
                weight[layer.channels[h]] = torch.linalg.qr(torch.randn(8, 8))[0] @ layer.rows()[0]
        given.set_constant(block.k.weight, weight.mT.contiguous() if block.k.transposed else weight)
        given.set_constant(block.k.bias, torch.zeros_like(block.k.bias.load()))
    given.finish()
    lost = [
        float((output(applied(MeanPooling(align=align), None, given, kind)) - output(given)).norm() / output(given).norm())
        for align, kind in ((True, "1 of 4 heads, aligned"), (False, "1 of 4 heads"))
    ]
    assert lost[0] < 1e-4 < 1e-2 < lost[1]
    assert spread(Grouping(given).blocks[0].k.rows(), ((0, 1, 2, 3),)) > 0.5


def test_identical_heads_lose_nothing():
    given = host("turned", "torch").copy()
    for block in Grouping(given).blocks:
        for layer in (block.k, block.v):
            given.set_constant(layer.weight, layer.rows()[:1].expand(2, -1, -1).reshape(layer.weight.shape).contiguous())
    given.finish()
    made = applied(MeanPooling(), None, given, "1 of 2 heads")
    torch.testing.assert_close(output(made), output(given), atol=2e-5, rtol=2e-5)


def test_numbers_of_groups_that_do_not_divide_the_heads_name_those_that_do():
    group = Grouping(host("packed", "torch")).of("block")[0]
    with pytest.raises(OutOfRange, match="divide 4: 1, 2, 4"):
        MeanPooling(groups=(3,)).propose(group, None)


def test_one_key_head_is_left():
    given = host("turned", "torch")
    made = rewritten(given, lambda g: MeanPooling().apply(MeanPooling().propose(g, None)[0], g), [0])
    refused = MeanPooling().propose(Grouping(made).of("block")[0], None)
    assert isinstance(refused, Refusal) and "one key head already" in refused.reason
