"""Choosing a cache policy: the fewest bytes that hold a budget on data that did not choose them."""

from __future__ import annotations

import hf_models
import pytest
import torch

import attnopt
from attnopt.errors import BudgetError
from attnopt.passes.kvcache.eviction import SinksWindow, Snapkv
from attnopt.plan.cache_choice import choose_policy, measured

SEQUENCES = torch.randint(2, hf_models.VOCABULARY, (6, 20), generator=torch.Generator().manual_seed(0))
POLICIES = (SinksWindow(sinks=1), Snapkv(window=2))


@pytest.fixture(scope="module")
def choice():
    return choose_policy(hf_models.build("llama", "sdpa"), SEQUENCES, 0.5, POLICIES, keeps=(0.5, 0.2), stores=(None, "int8"))


def test_the_fewest_bytes_within_the_budget_are_taken(choice):
    assert choice.taken.keep == 0.2
    assert choice.taken.share == min(one.share for one in choice.weighed)
    assert choice.taken.held.upper <= 0.5
    assert choice.taken.held.samples == choice.taken.loss.samples == 3
    assert len(choice.weighed) == 8
    assert "* " in str(choice)
    assert choice.taken.candidate.changes == ("cache",)


def test_what_is_over_the_budget_is_not_asked_to_keep_less():
    model = hf_models.build("llama", "sdpa")
    none = choose_policy(model, SEQUENCES, 1e-12, POLICIES, keeps=(0.5, 0.2), stores=(None,))
    assert none.taken is None
    assert [one.keep for one in none.weighed] == [0.5, 0.5]
    with pytest.raises(BudgetError, match="no policy holds a budget"):
        none.session()


def test_what_is_taken_is_what_was_measured(choice):
    model = hf_models.build("llama", "sdpa")
    with attnopt.cache(choice) as held:
        model(SEQUENCES[:1])
    assert held.policy == choice.taken.policy
    assert held.layers[0].places.shape[2] == 4
    with pytest.raises(BudgetError, match="has its own room"):
        attnopt.cache(choice, keep=0.5)


def test_room_for_all_loses_nothing():
    (one,) = measured(hf_models.build("llama", "sdpa"), SEQUENCES, 15, [(POLICIES[0], 1.0, None)], 4, 0)
    assert one.loss.mean < 1e-9


def test_budgets_and_data_that_tell_nothing():
    with pytest.raises(BudgetError, match="allows no token to leave"):
        attnopt.choose_cache(None, SEQUENCES, 0)
    with pytest.raises(BudgetError, match="at least four texts"):
        attnopt.choose_cache(None, SEQUENCES[:3], 0.1)
