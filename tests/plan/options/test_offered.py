"""What a live model cannot hold is not offered, and the report says why; what it can hold stays."""

from __future__ import annotations

import pytest
from live_models import host_of

from attnopt.cost.target import load_target
from attnopt.ir.site import Refusal
from attnopt.passes import DropAttention
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.offered import offered
from attnopt.plan.options.proposals import classes_of
from attnopt.plan.options.workshop import Workshop


@pytest.fixture(scope="module")
def shop():
    host = host_of("llama")
    return Workshop(host, {}, load_target("cpu")[0], "torch", 0, host.graph.sizes(host.example_inputs()))


@pytest.fixture(scope="module")
def classes(shop):
    return classes_of(Grouping(shop.host), [DropAttention()], None)


def lacking(first: str):
    """Refuses a graph in which the attention of this module is gone."""

    def takes(result):
        there = any(s.source.module == first for s in Grouping(result).sites)
        return None if there else Refusal("it counts tokens", first)

    return takes


def test_what_cannot_be_given_back_is_not_offered(shop, classes):
    found = offered(classes, shop, lacking("model.layers.0.self_attn"))
    kept = {each.name: len(each.options) for each in found}
    assert sorted(kept.values()) == [1, 2]  # as it is, and without the second
    (said,) = [dict(each.refusals)["drop-attention"] for each in found if each.refusals]
    assert said.reason == "it counts tokens"


def test_what_is_refused_together_only_is_offered_nowhere(shop, classes):
    found = offered(classes, shop, lambda result: None if Grouping(result).sites else Refusal("nothing is left"))
    assert all(len(each.options) == 1 and each.refusals for each in found)


def test_without_a_form_to_give_back_all_stays(shop, classes):
    assert [len(each.options) for each in offered(classes, shop)] == [2, 2]
