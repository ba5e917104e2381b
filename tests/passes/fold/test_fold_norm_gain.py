"""Gains and biases of norms go into the layers after them, where they are operations of their own."""

from __future__ import annotations

import pytest
from folded_models import EXPORTED, folded, host, refusals, require_equal

from attnopt.passes import FoldNormGain
from attnopt.plan.options.groups import Grouping


@pytest.mark.parametrize(("kind", "options"), [("torch", EXPORTED), ("torch", {"norm": "mean", "biased": False}), ("onnx", {})])
def test_outputs_stay_and_norms_have_no_gain(kind, options):
    given = host(kind, **options)
    made = folded(FoldNormGain(), given)
    require_equal(made, given)
    norms = [g.norm for g in Grouping(made).of("linear") if g.norm is not None]
    assert len(norms) == 3 and all(n.weight is None and n.bias is None for n in norms)


def test_the_gain_of_one_operation_stays():
    assert refusals(FoldNormGain(), host())[0] == "the norm is one operation, whose gain costs nothing of its own"


def test_a_tied_head_is_not_stored_twice():
    given = host(norm="rms", tied=True)
    made = folded(FoldNormGain(), given)
    require_equal(made, given)
    assert any("would be stored twice" in reason for reason in refusals(FoldNormGain(), given))
    assert [g.norm.weight is None for g in Grouping(made).of("linear") if g.norm is not None] == [True, True, False]


def test_norms_that_share_layers_are_refused():
    """A layer that stands twice reads two norms with one gain: only the head has a norm of its own."""
    given = host(norm="rms", shared=True)
    assert refusals(FoldNormGain(), given) == ["the layers read no norm, or several"] * 4
