"""Caches of live models that grow in place hold what transformers' own would hold, and are changed in the same ways."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from live_models import generated, language_model, tokens
from transformers import DynamicCache

import attnopt
from attnopt.hosts.eviction import in_rooms
from attnopt.hosts.eviction.layer import EvictingLayer
from attnopt.hosts.eviction.whole_layer import WholeLayer
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.model import as_live


@pytest.fixture(autouse=True)
def every_cache_is_long(monkeypatch):
    monkeypatch.setattr(in_rooms, "LONG", 1)


@lru_cache
def pair(family: str):
    """A model, and the same as a live one."""
    model = language_model(family)
    return model, as_live(shared_copy(model), None, None, {})


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"num_return_sequences": 2, "num_beams": 2}],
    ids=["greedy", "beams", "taken back", "several"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_is_that_of_the_model(family, options):
    given = tokens(1) if "prompt_lookup_num_tokens" in options else tokens(padded=3)
    wanted, found = (generated(m, given, return_dict_in_generate=True, **options) for m in pair(family))
    assert torch.equal(found.sequences, wanted.sequences)
    assert {type(x) for x in found.past_key_values.layers} == {WholeLayer}
    for a, b in zip(found.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys)
        torch.testing.assert_close(a.values, b.values)


def test_layers_with_a_window_and_caches_of_fixed_size_stay_as_they_are():
    model, fast = pair("gemma2")
    found = generated(fast, tokens(), return_dict_in_generate=True)
    assert [type(x).__name__ for x in found.past_key_values.layers] == ["DynamicSlidingWindowLayer", "WholeLayer"]
    assert torch.equal(found.sequences, generated(model, tokens()))
    assert torch.equal(generated(fast, tokens(), cache_implementation="static"), generated(model, tokens()))


def test_a_cache_of_ones_own_goes_on_in_its_place_and_may_be_written():
    model, fast = pair("llama")
    ids = tokens(1)["input_ids"]
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        fast(ids, past_key_values=cache)
        fast(ids[:, -1:], past_key_values=cache)
        (room,) = {id(x.k.room) for x in cache.layers[:1]}
        fast(ids[:, :1], past_key_values=cache)
        assert id(cache.layers[0].k.room) == room and cache.get_seq_length() == 14
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :13].clone(), layer.values[:, :, :13].clone()
        found = model(ids[:, :1], past_key_values=cache).logits  # the model itself goes on as well
        wanted = model(torch.cat([ids, ids[:, -1:], ids[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_short_caches_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(in_rooms, "LONG", 2 * 2 * 16 * 16 * 4)  # the keys of 16 tokens
    found = generated(pair("llama")[1], tokens(), count=3, return_dict_in_generate=True)
    assert not any(isinstance(x, WholeLayer) for x in found.past_key_values.layers)
    found = generated(pair("llama")[1], tokens(), count=8, return_dict_in_generate=True)
    assert all(isinstance(x, WholeLayer) for x in found.past_key_values.layers)


def test_a_policy_lets_tokens_leave_a_room():
    fast = pair("llama")[1]
    with torch.no_grad():
        cache = fast(tokens(1)["input_ids"]).past_key_values
        fast(tokens(1)["input_ids"][:, :1], past_key_values=cache)
        with attnopt.cache("sinks-window", capacity=6, sinks=2):
            fast(tokens(1)["input_ids"][:, :1], past_key_values=cache)
    assert all(isinstance(x, EvictingLayer) and x.keys.shape[2] == 6 for x in cache.layers)
