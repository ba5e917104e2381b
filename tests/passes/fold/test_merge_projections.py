"""Keys and values become the hidden states where one key head is wide enough; several heads are refused, and so is what costs more."""

from __future__ import annotations

import pytest
from folded_models import WIDTH, folded, host, refusals, require_equal

from attnopt.passes import FoldBiases, MergeProjections
from attnopt.plan.folding import offered
from attnopt.plan.options.groups import Grouping

WIDE = {"heads": 1, "key_heads": 1, "head": WIDTH, "biased": False}


@pytest.mark.parametrize("options", [WIDE, {**WIDE, "heads": 2, "head": 20, "shared": True}])
def test_outputs_stay_and_two_layers_go(options):
    given = host(**options)
    made = folded(MergeProjections(), given)
    require_equal(made, given)
    products = [sum(n.op in ("linear", "matmul") and n.inputs[1].is_constant for n in h.graph.nodes) for h in (given, made)]
    assert products[0] - products[1] == 2 * len(Grouping(given).sites)
    assert {(s.size("d"), s.size("e"), s.size("g")) for s in Grouping(made).sites} == {(WIDTH, WIDTH, 1)}


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_the_bias_of_keys_drops_out_and_that_of_values_goes_first(kind):
    given = host(kind, **{**WIDE, "biased": True})
    assert [m.candidate.kind for m in offered(Grouping(given), MergeProjections())] == ["keys merged"]
    require_equal(folded(MergeProjections(), given), given)
    without = folded(FoldBiases(), given)
    assert [m.candidate.kind for m in offered(Grouping(without), MergeProjections())] == ["keys and values merged"]
    require_equal(folded(MergeProjections(), without), given)


def test_several_key_heads_are_refused():
    assert "3 heads of values have matrices of their own" in refusals(MergeProjections(), host(biased=False))[0]


def test_narrow_heads_are_refused_with_their_price():
    (reason,) = refusals(MergeProjections(), host(heads=3, key_heads=1, biased=False))
    assert reason == "merged, values would take 1,728 products for each token where they take 768 now"
