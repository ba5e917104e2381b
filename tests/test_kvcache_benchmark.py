"""The benchmark of caches that forget measures what it says: the full cache's own logits, shares that were held, answers by distance."""

from __future__ import annotations

import contextlib

import hf_models
import kvcache
import pytest
import torch
from eviction.agreement import agreements
from eviction.subjects import Recall, Subject, by_distance, first_asked
from recall_task import recall_batch

import attnopt
from attnopt.passes.kvcache.eviction import SinksWindow, Snapkv

TOKENS = torch.randint(2, hf_models.VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def subject():
    return Subject("tiny", hf_models.build("llama", "sdpa"), TOKENS, 30, TOKENS)


def test_with_the_full_cache_the_rest_is_read_as_in_one_pass(subject):
    with torch.no_grad():
        wanted = subject.model(TOKENS).logits[:, 30:]
    torch.testing.assert_close(subject.logits(contextlib.nullcontext, batch=2)[0], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", [kvcache.Random(), SinksWindow(sinks=0), Snapkv(window=3)], ids=lambda p: p.name)
def test_the_share_that_was_held_is_that_of_the_prompt(subject, policy):
    made = kvcache.measured(subject, policy.name, 0.3, lambda: attnopt.cache(policy, 0.3, every=None), torch.zeros(3))
    assert made.held == pytest.approx(0.3)
    assert made.low <= made.value <= made.high
    assert made.samples == 3


def test_orders_of_a_window_and_of_lots(subject):
    found = agreements(subject, {"window": SinksWindow(), "random": kvcache.Random()}, 2)
    assert {name: tuple(x.shape) for name, x in found.items()} == {"window": (2,), "random": (2,)}
    assert all((x.abs() <= 1).all() for x in found.values())


def test_answers_by_distance():
    made = recall_batch(2, 4, 300, seed=0)
    distances = made.asked - made.places
    fresh = first_asked(made.tokens[:, made.asked])
    task = Recall("recall", torch.nn.Identity(), made.tokens, 300, made.tokens, made.asked, made.answers, distances, fresh)
    assert fresh.sum(1).tolist() == [len(set(row.tolist())) for row in made.tokens[:, made.asked]]
    near = (distances < 128).double()
    assert by_distance(task, near)["0-127"] == 1.0
    assert by_distance(task, near)["128-255"] == 0.0
    logits = torch.nn.functional.one_hot(made.tokens[:, 301:], 80).double()  # each position says the next token
    whole = torch.cat([logits, logits[:, -1:]], 1)
    assert task.right(whole).all()
    assert task.accuracy(whole).tolist() == [1.0, 1.0]
