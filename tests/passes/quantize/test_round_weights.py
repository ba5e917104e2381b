"""round-weights: which formats are proposed for which layers, and how near the result is, in both hosts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_models import X, groups, opened

from attnopt.ir.site import Refusal
from attnopt.passes import DynamicInt8, QuestRounding, RoundWeights
from attnopt.passes.weight_rounding import Wish

LOSS = {8: 0.05, 4: 0.2, 2: 1.0}


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_formats_follow_the_width_of_a_layer(kind):
    host = opened(kind)
    found = [RoundWeights().propose(g, None) for g in groups(host)]
    assert [[c.kind for c in each] for each in found] == [
        ["int8 group 64", "int4 group 32", "int4 group 64"],
        ["int8 group 32", "int4 group 32"],
        ["int8 group 64", "int4 group 32", "int4 group 64"],
        ["int8 group 128", "int4 group 32", "int4 group 128"],
    ]
    first = found[0][1]
    assert first.storage == {first.nodes[0].name: "int4 group 32"} == first.options["formats"]
    assert (first.changes, first.needs, first.exact) == (("weights",), "nothing", False)
    assert first.description == "weights of the linear layer as int4 group 32, rounded to the nearest"


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_result_is_near_and_the_original_stays(kind, bits):
    host = opened(kind)
    rewrite = RoundWeights(wishes=(Wish(bits, 32),))
    name = next(iter(host.example_inputs()))
    wanted = host.runner()({name: X})[0]
    copy = host.copy()
    for mine, theirs in zip(groups(host), groups(copy), strict=True):
        (candidate,) = rewrite.propose(mine, None)
        assert rewrite.apply(candidate, replace(theirs, host=copy)).host is copy
    copy.finish()
    relative = float((copy.runner()({name: X})[0] - wanted).norm() / wanted.norm())
    assert LOSS[bits] / 100 < relative < LOSS[bits]
    torch.testing.assert_close(host.runner()({name: X})[0], wanted, atol=0, rtol=0)


@pytest.mark.parametrize("rewrite", [RoundWeights(), DynamicInt8(), QuestRounding()])
def test_weights_that_are_no_numbers_are_named(rewrite):
    host = opened("torch")
    weight = groups(host)[0].linears[0].inputs[1]
    data = weight.load().clone()
    data[3, 5] = float("nan")
    host.set_constant(weight, data)
    host.finish()
    refused = rewrite.propose(groups(host)[0], None)
    assert isinstance(refused, Refusal)
    assert refused.reason == "1 weights are NaN, the first at [3, 5]"


def test_rows_that_no_group_divides_are_refused():
    host = opened("torch")
    refused = RoundWeights(wishes=(Wish(4, 8),)).propose(groups(host)[0], None)
    assert refused.reason == "no group of 16 to 8 divides rows of 64 inputs; 8 do"
