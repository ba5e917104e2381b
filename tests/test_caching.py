"""attnopt.cache by name and by hand: what it takes, and what it says of what it does not."""

from __future__ import annotations

import hf_models
import pytest
import torch

import attnopt
from attnopt.errors import BudgetError, InputMismatch, UnknownPolicy
from attnopt.passes.kvcache.eviction import Snapkv


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "keep=0.25 or capacity"),
        ({"keep": 0.0}, "0.0 is no share"),
        ({"keep": 1.5}, "1.5 is no share"),
        ({"layers": {0: 2}}, "2 is no share"),
        ({"heads": {0: (0.5, -1)}}, "-1 is no share"),
        ({"keep": 0.5, "capacity": 4}, "not both"),
        ({"capacity": 0}, "capacity=0 is no number"),
        ({"keep": 0.5, "every": -1}, "every=-1 is no number"),
    ],
)
def test_rooms_that_mean_nothing(given, message):
    with pytest.raises(BudgetError, match=message):
        attnopt.cache("snapkv", **given)


def test_names_and_fields_that_are_unknown():
    with pytest.raises(UnknownPolicy, match=r"'snap' is not a cache policy. Known: sinks-window, key-norm, snapkv"):
        attnopt.cache("snap", keep=0.5)
    with pytest.raises(InputMismatch, match=r"snapkv has no such field.*Its fields: window, kernel"):
        attnopt.cache("snapkv", keep=0.5, windows=3)
    with pytest.raises(InputMismatch, match="share a scale over tokens"):
        attnopt.cache("snapkv", keep=0.5, store="cache(k=int8, v=int8, k_axis=channel)")


def test_filters_are_asked_for_before_a_model_runs():
    with pytest.raises(InputMismatch, match=r"policy = attnopt.query_filters\(model, batches\)"):
        attnopt.cache("q-filters", keep=0.5)


def test_a_policy_by_hand():
    model = hf_models.build("llama", "sdpa")
    ids = torch.randint(2, 99, (1, 12))
    with attnopt.cache(Snapkv(window=2), 0.5, kernel=3) as held:
        model(ids)
    assert held.policy == Snapkv(window=2, kernel=3)
    assert held.layers[1].places.shape[2] == 6


def test_filters_of_a_model_leave_padding_out():
    model = hf_models.build("llama", "sdpa")
    ids = torch.randint(2, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    padded = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    made, alone = attnopt.query_filters(model, [padded]), attnopt.query_filters(model, [ids[:, 5:]])
    assert {i: tuple(f.shape) for i, f in made.filters.items()} == {0: (2, 8), 1: (2, 8)}
    for index in (0, 1):
        torch.testing.assert_close(made.filters[index], alone.filters[index], atol=1e-4, rtol=1e-4)
        assert ((made.energy[index] > 0) & (made.energy[index] <= 1)).all()
    with attnopt.cache(made, keep=0.5) as held:
        model(ids)
    assert held.layers[0].places.shape[2] == 6
    with pytest.raises(InputMismatch, match="no queries were seen"):
        attnopt.query_filters(model, [])
