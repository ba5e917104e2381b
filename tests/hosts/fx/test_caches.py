"""Models that return or take the key/value caches of transformers: same values, same cache types, other lengths, saved files."""

from __future__ import annotations

import pytest
import torch
from hf_models import VOCABULARY, build, inputs
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import attnopt
from attnopt.errors import InputMismatch
from attnopt.hosts.fx.caches import our_forms
from attnopt.hosts.fx.trees import flatten, unflatten


def prompt(family, **sizes):
    """Inputs of a model that keeps its cache, as its configuration says."""
    return {name: x for name, x in inputs(family, "none", **sizes).items() if name != "use_cache"}


def token(batch, count=1):
    return torch.randint(0, VOCABULARY, (batch, count))


def same_layers(wanted, got):
    assert type(got) is type(wanted)
    assert got.get_seq_length() == wanted.get_seq_length()
    for a, b in zip(wanted.layers, got.layers, strict=True):
        assert type(a) is type(b)
        torch.testing.assert_close(b.keys, a.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(b.values, a.values, atol=1e-5, rtol=1e-5)
        assert getattr(a, "cumulative_length", 0) == getattr(b, "cumulative_length", 0)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", ["llama", "mistral"])  # mistral: a window of 6, shorter than the prompt
def test_a_returned_cache_continues_the_text(family, tmp_path):
    model = build(family, "sdpa")
    fast = attnopt.optimize(model, prompt(family), select="always")
    assert fast.report.fused == 2
    other = prompt(family, batch=3, length=17)
    next_token = token(3)
    for call in (fast, attnopt.load(fast.export(tmp_path / "fast.pt2"))):
        with torch.no_grad():
            wanted, got = model(**other), call(**other)
            torch.testing.assert_close(got.logits, wanted.logits, atol=1e-5, rtol=1e-5)
            same_layers(wanted.past_key_values, got.past_key_values)
            one, two = (model(input_ids=next_token, past_key_values=x.past_key_values).logits for x in (wanted, got))
        torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)


def test_a_cache_becomes_named_outputs_of_an_onnx_file(tmp_path):
    model = build("mistral", "sdpa")
    path = attnopt.optimize(model, prompt("mistral"), select="always").export(tmp_path / "fast.onnx")
    fast, other = attnopt.load(path), prompt("mistral", batch=3, length=17)
    wanted = model(**other)
    logits, *cache = fast({name: x.numpy() for name, x in other.items()})
    torch.testing.assert_close(torch.from_numpy(logits), wanted.logits, atol=1e-4, rtol=1e-4)
    layers = wanted.past_key_values.layers
    expected = [x.keys for x in layers] + [x.values for x in layers] + [torch.tensor(17)] * 2
    assert len(cache) == len(expected)
    for a, b in zip(expected, cache, strict=True):
        torch.testing.assert_close(torch.as_tensor(b), a, atol=1e-4, rtol=1e-4)


def test_two_caches_of_encoder_and_decoder():
    model = build("t5", "sdpa")
    fast = attnopt.optimize(model, prompt("t5"), select="always")
    other = prompt("t5", batch=3, length=9, decoder_length=5)
    with torch.no_grad():
        wanted, got = model(**other).past_key_values, fast(**other).past_key_values
    assert isinstance(got, EncoderDecoderCache)
    assert got.is_updated == wanted.is_updated
    same_layers(wanted.self_attention_cache, got.self_attention_cache)
    same_layers(wanted.cross_attention_cache, got.cross_attention_cache)


@pytest.mark.parametrize("count", [1, 3])
def test_steps_on_a_given_cache(count):
    model = build("llama", "sdpa")

    def past(length, batch=2):
        with torch.no_grad():
            return model(**prompt("llama", batch=batch, length=length)).past_key_values

    given = past(12)
    fast = attnopt.optimize(model, {"input_ids": token(2, count), "past_key_values": given}, select="always")
    assert given.get_seq_length() == 12  # the user's own cache stays as it was
    assert fast.report.fused == 2
    for length, batch in ((12, 2), (30, 3)):
        ids = token(batch, count)
        with torch.no_grad():
            wanted = model(input_ids=ids, past_key_values=past(length, batch))
            got = fast(input_ids=ids, past_key_values=past(length, batch))
        torch.testing.assert_close(got.logits, wanted.logits, atol=1e-5, rtol=1e-5)
        same_layers(wanted.past_key_values, got.past_key_values)


def test_a_length_that_the_trace_does_not_hold_for_is_refused():
    """The trace of a window of 6 under a prompt of 12 holds from 5 tokens on: shorter prompts keep all their keys."""
    fast = attnopt.optimize(build("mistral", "sdpa"), prompt("mistral"), select="always")
    with pytest.raises(
        InputMismatch, match="dimension 1 of input 'input_ids' is 3; the trace of this model holds for at least 5"
    ):
        fast(**prompt("mistral", length=3))


def test_trees_of_the_older_form_read_back():
    keys, values = [torch.randn(2, 2, 5, 8)], [torch.randn(2, 2, 5, 8)]
    _, spec = flatten(DynamicCache(zip(keys, values, strict=True)), our_forms())
    cache = unflatten([keys[0], values[0]], spec, our_forms())
    assert spec.context == [["key_cache", "value_cache"], [None]]
    assert torch.equal(cache.layers[0].keys, keys[0])
    assert cache.get_seq_length() == 5


def test_a_cache_of_other_layers_says_so():
    cache = DynamicCache(zip([torch.randn(2, 2, 5, 8)], [torch.randn(2, 2, 5, 8)], strict=True))
    cache.layers[0].__class__ = type("OddLayer", (type(cache.layers[0]),), {})
    with pytest.raises(TypeError, match="a OddLayer of a cache is no pair of keys and values"):
        flatten(cache, our_forms())


def test_layers_of_one_cache_are_equally_long():
    model = build("llama", "sdpa")
    with torch.no_grad():
        given, uneven = (model(**prompt("llama")).past_key_values for _ in range(2))
    site = attnopt.inspect(model, {"input_ids": token(2), "past_key_values": given}).sites[0].site
    assert str(site.size("k")) == "past + 1"
    assert site.spec.head_counts == (4, 2, 2)
    fast = attnopt.optimize(model, {"input_ids": token(2), "past_key_values": given}, select="always")
    layer = uneven.layers[1]
    layer.keys, layer.values = layer.keys[:, :, :5], layer.values[:, :, :5]
    with pytest.raises(InputMismatch, match=r"'past' is 12 in .* but 5 in 'past_key_values_key_cache_1'"):
        fast(input_ids=token(2), past_key_values=uneven)


def test_a_cache_that_comes_in_goes_out_of_an_onnx_file_under_names_of_its_own(tmp_path):
    model = build("llama", "sdpa")

    def given(length):
        with torch.no_grad():
            return {"input_ids": token(2), "past_key_values": model(**prompt("llama", length=length)).past_key_values}

    fast = attnopt.load(attnopt.optimize(model, given(12), select="always").export(tmp_path / "fast.onnx"))
    call = given(20)
    layers = call["past_key_values"].layers
    named = {"input_ids": call["input_ids"]}
    named |= {
        f"past_key_values_{kind}_cache_{i}": getattr(x, f"{kind}s") for kind in ("key", "value") for i, x in enumerate(layers)
    }
    logits, *cache = fast({name: x.numpy() for name, x in named.items()})
    wanted = model(**call)
    torch.testing.assert_close(torch.from_numpy(logits), wanted.logits, atol=1e-4, rtol=1e-4)
    after = wanted.past_key_values.layers
    for a, b in zip([x.keys for x in after] + [x.values for x in after], cache, strict=True):
        torch.testing.assert_close(torch.from_numpy(b), a, atol=1e-4, rtol=1e-4)
