"""Policies on a live layer that keeps narrower keys than its class makes them: they choose as they do by whole keys and queries."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
import transformers

import attnopt
from attnopt.errors import InputMismatch
from attnopt.hosts.module.widths import narrow
from attnopt.plan.live.converting import attach

IDS = torch.randint(2, 99, (2, 14), generator=torch.Generator().manual_seed(0))
SMALL = {
    "sinks-window": {"sinks": 2},
    "key-norm": {"whole": 0},
    "snapkv": {"window": 3},
    "expected-attention": {"sinks": 2, "future": 8},
    "q-filters": {},
}


@lru_cache
def pair():
    """A layer whose keys and queries are zero from channel 5 of 8 on, and the same keeping the first 5."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32, "initializer_range": 0.3}
    whole = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, attn_implementation="sdpa")).eval()
    attention = whole.transformer.h[0].attn
    with torch.no_grad():
        attention.c_attn.weight[:, :64].unflatten(1, (8, 8))[..., 5:] = 0  # of q and k, each four heads
    cut = copy.deepcopy(whole)
    narrow(cut.transformer.h[0].attn, keys=5, values=8, whole=8)
    attach(cut, {}, windows=False)
    return whole, cut


def policy_of(name, model):
    return attnopt.query_filters(model, [IDS]) if name == "q-filters" else name


def generated(model, **given):
    return model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0, **given)


@pytest.mark.parametrize("name", SMALL)
def test_room_for_all_is_the_full_cache_and_a_share_is_that_of_whole_keys(name):
    whole, cut = pair()
    with attnopt.cache(policy_of(name, cut), keep=1.0, **SMALL[name]):
        kept = generated(cut)
    assert torch.equal(kept, generated(whole))
    held = {}
    for model in pair():
        with attnopt.cache(policy_of(name, model), keep=0.5, every=3, **SMALL[name]) as session:
            held[model] = generated(model), session.layers[0].places, session.layers[0].k.read().shape[3]
    assert torch.equal(held[cut][0], held[whole][0]) and torch.equal(held[cut][1], held[whole][1])
    assert (held[cut][2], held[whole][2]) == (5, 8)


@pytest.mark.parametrize("attention", ["attnopt", "eager"])
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_what_is_kept_is_what_a_mask_of_the_full_computation_shows(name, attention):
    model = copy.deepcopy(pair()[1])
    model.set_attn_implementation(attention)
    past, prompt, rest = transformers.DynamicCache(config=model.config), IDS[:1, :10], IDS[:1, 10:]
    with attnopt.cache(policy_of(name, model), heads={0: (0.4, 0.7, 1.0, 0.5)}, every=None, **SMALL[name]) as session:
        model(prompt, past_key_values=past)
        places = session.layers[0].places[0]
        found = model(rest, past_key_values=past).logits
    shown = torch.ones(4, 14, 14, dtype=torch.bool).tril()
    for head in range(4):
        shown[head, 10:, sorted(set(range(10)) - set(places[head].tolist()))] = False
    mask = torch.zeros(1, 4, 14, 14).masked_fill(~shown, torch.finfo(torch.float32).min)
    wanted = model(IDS[:1], attention_mask=mask).logits[:, 10:]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_filters_of_whole_queries_do_not_fit_narrow_keys():
    whole, cut = pair()
    with (
        attnopt.cache(policy_of("q-filters", whole), keep=0.5),
        pytest.raises(InputMismatch, match="the model that they are used"),
    ):
        generated(cut)
