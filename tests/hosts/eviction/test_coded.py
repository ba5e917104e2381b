"""A cache in codes computes what its clause says, token for token, however the model is asked."""

from __future__ import annotations

import pytest
import torch
import transformers
from live_models import generated, language_model, tokens
from transformers import DynamicCache

import attnopt
from attnopt.errors import AttnoptError
from attnopt.hosts.eviction.coded import CodedLayer, bytes_per_token, fresh, in_codes
from attnopt.hosts.eviction.layer import EvictingLayer
from attnopt.hosts.eviction.stored import storage
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.model import as_live
from attnopt.ir.reference import reference

FORMS = {
    "cache(k=int8, v=int8)": 2 * 2 * 2 * (16 + 8),
    "cache(v=int8)": 2 * 2 * (64 + 16 + 8),
    "cache(k=int4, v=int4, group=8, scales=fp16)": 2 * 2 * 2 * (8 + 8),
    "cache(k=int2, v=int2, group=32, scales=fp16)": 2 * 2 * 2 * (4 + 4),
}


@pytest.fixture(scope="module")
def model():
    return language_model("llama")


def in_form(model, words):
    return as_live(shared_copy(model), None, None, {}, cache_codes=words)


def by_hand(words):
    """The model whose attention is the reference of a spec with this clause, on the whole sequence at once."""

    def attend(module, q, k, v, mask, scaling, **kwargs):
        spec = f"softmax heads(4, 2) scale({scaling!r}) causal & load(seen, b, q, k) {words}"
        seen = (mask > -1) if mask is not None else torch.ones(len(q), 1, q.shape[2], q.shape[2], dtype=torch.bool)
        return reference(spec, q, k, v, seen=seen[:, 0].expand(len(q), -1, -1)).transpose(1, 2), None

    name = f"by-hand-{abs(hash(words))}"
    transformers.AttentionInterface.register(name, attend)
    transformers.AttentionMaskInterface.register(name, transformers.masking_utils.eager_mask)
    made = language_model("llama")
    made.set_attn_implementation(name)
    return made


@pytest.mark.parametrize("words", FORMS)
def test_prompts_and_new_tokens_are_those_of_the_spec(model, words):
    """In float64, where no last bit moves a number over the border between two codes."""
    given, plain = tokens(padded=3), by_hand(words).double()
    fast = in_form(language_model("llama").double(), words)
    out = generated(fast, given, return_dict_in_generate=True, output_logits=True)
    expected = generated(plain, given, use_cache=False, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), rtol=1e-9, atol=1e-9)
    assert all(isinstance(layer, CodedLayer) for layer in out.past_key_values.layers)


@pytest.mark.parametrize("words", FORMS)
def test_bytes_of_a_token_are_those_of_codes_and_scales(model, words):
    with torch.no_grad():
        assert bytes_per_token(in_form(model, words)(**tokens()).past_key_values) == FORMS[words]
    assert bytes_per_token(model(**tokens()).past_key_values) == 2 * 2 * 2 * 64


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
def test_beams_and_rolling_back(model, way):
    fast = in_form(model, "int8")
    given = tokens(rows=1)
    expected = generated(
        by_hand("cache(k=int8, v=int8)"), given, use_cache=False, **({} if "prompt_lookup_num_tokens" in way else way)
    )
    assert torch.equal(generated(fast, given, **way), expected)


def test_a_loop_of_ones_own_and_a_cache_of_before(model):
    """forward makes the cache; one that holds tokens as they are is rounded when it comes in."""
    fast, ids = in_form(model, "int8"), tokens()["input_ids"]
    with torch.no_grad():
        first = fast(ids[:, :8]).past_key_values
        exact = model(ids[:, :8]).past_key_values
        assert fast(ids, use_cache=False).past_key_values is None
        later, again = (fast(ids[:, 8:], past_key_values=past).past_key_values for past in (first, exact))
    assert [type(x) for x in again.layers] == [CodedLayer] * 2 and later.get_seq_length() == 12
    assert torch.equal(exact.layers[0].keys, first.layers[0].keys)  # of the first layer, which reads no cache before


def test_without_codes_the_cache_is_as_it_comes(model):
    fast = in_form(model, "int8")
    fast.cache_codes = None
    out = generated(fast, tokens(), return_dict_in_generate=True)
    assert torch.equal(out.sequences, generated(model, tokens())) and type(out.past_key_values.layers[0]) is not CodedLayer


def test_a_policy_forgets_codes(model):
    fast = in_form(model, "int8")
    with attnopt.cache("sinks-window", keep=1.0) as held:
        found = generated(fast, tokens())
    assert isinstance(held.layers[0], EvictingLayer) and held.layers[0].clause == storage("int8")
    assert torch.equal(found, generated(fast, tokens()))
    with torch.no_grad():
        past = fast(tokens()["input_ids"]).past_key_values
        before = past.layers[0].keys
        with attnopt.cache("sinks-window", keep=1.0):
            fast(tokens()["input_ids"][:, :1], past_key_values=past)
    assert torch.equal(past.layers[0].keys[:, :, :12], before)  # rounded once


def test_windows_keep_their_own_cache_and_others_are_refused():
    model = in_form(language_model("gemma2", "eager"), "int8")
    out = generated(model, tokens(), return_dict_in_generate=True)
    assert sorted(type(x).__name__ for x in out.past_key_values.layers) == ["CodedLayer", "DynamicSlidingWindowLayer"]
    with pytest.raises(AttnoptError, match=r"a StaticCache of .* cannot hold them.*model.cache_codes = None"):
        generated(model, tokens(), cache_implementation="static")
    with pytest.raises(AttnoptError, match="moved between devices"):
        in_codes(DynamicCache(offloading=True), storage("int8"))


def test_a_layer_without_attention_counts_its_tokens(model):
    cache = fresh(model, storage("cache(k=int4, v=int4, scales=fp16)"))
    place = torch.zeros(2, 1, 5, 1)
    assert torch.equal(cache.update(place, place, 0)[0], place) and cache.get_seq_length() == 5
    cache.crop(-2)
    assert cache.get_seq_length() == 3
    cache.reset()
    assert cache.get_seq_length() == 0
