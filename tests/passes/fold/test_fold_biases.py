"""Keys lose their bias, that of values goes behind the attention; not where the softmax would see it."""

from __future__ import annotations

import pytest
from folded_models import folded, host, refusals, require_equal

from attnopt.passes import FoldBiases
from attnopt.plan.options.groups import Grouping


@pytest.mark.parametrize(("kind", "options"), [("torch", {}), ("torch", {"key_heads": 1}), ("onnx", {})])
def test_outputs_stay_and_keys_and_values_have_no_bias(kind, options):
    given = host(kind, **options)
    made = folded(FoldBiases(), given)
    require_equal(made, given)
    for before, after in zip(Grouping(given).blocks, Grouping(made).blocks, strict=True):
        assert after.k.bias is None and after.v.bias is None and after.q.bias is not None
        assert float((after.o.bias.load() - before.o.bias.load()).abs().max()) > 1e-2


def test_a_soft_cap_keeps_the_bias_of_keys():
    given = host(soft=True)
    made = folded(FoldBiases(), given)
    require_equal(made, given)
    assert all(b.k.bias is not None and b.v.bias is None for b in Grouping(made).blocks)


def test_without_biases_there_is_nothing_to_do():
    assert refusals(FoldBiases(), host(biased=False)) == ["values have no bias"]


def test_layers_that_stand_twice_keep_their_biases():
    assert refusals(FoldBiases(), host(shared=True)) == ["the layers of values and output share channels or weights"]
