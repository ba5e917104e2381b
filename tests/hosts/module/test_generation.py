"""A live model with kernels in every layer generates the tokens that the original generates, however it is asked."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from live_models import generated, host_of, language_model, tokens

import attnopt
from attnopt.cost.target import read
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.interface import BEFORE, HELD, NAME
from attnopt.hosts.module.layer_attention import LayerAttention
from attnopt.plan.live.converting import attach, live, noted
from attnopt.plan.live.layers import Chooser

WAYS = {
    "plain": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.fixture(scope="module")
def pairs():
    made = {}

    def of(family: str):
        if family not in made:
            host = host_of(family)
            found = live(host, [], tokens(), Chooser("always", read("cpu"), length=16))
            assert not found.refusals and len(found.layers) == 2
            made[family] = (host.model, found.model)
        return made[family]

    return of


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padded", [0, 3])
def test_greedy_tokens_are_equal(pairs, family, way, padded):
    model, fast = pairs(family)
    given = tokens(padded=padded)
    assert torch.equal(generated(fast, given, **WAYS[way]), generated(model, given, **WAYS[way]))


@pytest.mark.exhaustive  # layers of another class, the same way
def test_gpt2_whose_layers_are_conv1d(pairs):
    model, fast = pairs("gpt2")
    assert torch.equal(generated(fast, tokens(padded=2)), generated(model, tokens(padded=2)))


@pytest.mark.parametrize(("family", "attention"), [("gemma2", "eager"), ("qwen3", "sdpa"), ("mistral", "eager")])
@pytest.mark.parametrize("padded", [0, 3])
def test_layers_without_a_kernel_go_the_models_own_way(family, attention, padded):
    """Soft caps, norms of heads, windows for which no mask was made."""
    model = language_model(family, attention)
    fast = shared_copy(model)
    attach(fast, {path: LayerAttention("softmax", call) for path, call in noted(fast, tokens()).items()}, windows=True)
    assert torch.equal(generated(fast, tokens(padded=padded)), generated(model, tokens(padded=padded)))


@pytest.mark.exhaustive  # TVM compiles six kernels
def test_soft_caps_and_windows_by_kernels():
    host = host_of("gemma2", "eager")
    found = live(host, [], tokens(), Chooser("always", read("cpu"), length=16))
    assert torch.equal(generated(found.model, tokens()), generated(host.model, tokens()))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_prompt_in_two_parts(pairs, family):
    """Several queries on a cache that holds something: transformers makes a mask, and the model's own attention reads it."""
    model, fast = pairs(family)
    ids = tokens(length=20)["input_ids"]
    with torch.no_grad():
        first, other = (m(ids[:, :11], use_cache=True) for m in (model, fast))
        want, got = (m(ids[:, 11:], past_key_values=x.past_key_values).logits for m, x in ((model, first), (fast, other)))
    assert torch.allclose(want, got, atol=1e-4)


def test_the_kernels_run_where_there_is_no_mask(pairs):
    """Prompts longer than the window too, which transformers would mask; with padding the model's own way is taken."""
    _, fast = pairs("mistral")
    held = {path: getattr(m, HELD) for path, m in fast.named_modules() if hasattr(m, HELD)}
    ran = []
    for path, each in held.items():
        phases = {n: listening(ran, n, getattr(each, n)) for n in ("prefill", "decode")}
        setattr(fast.get_submodule(path), HELD, replace(each, **phases))
    try:
        generated(fast, tokens(), count=3)
        assert ran == ["prefill"] * 2 + ["decode"] * 4
        ran.clear()
        generated(fast, tokens(padded=3), count=3)
        assert "prefill" not in ran
    finally:
        for path, each in held.items():
            setattr(fast.get_submodule(path), HELD, each)


def listening(ran: list[str], word: str, kernel):
    def call(q, k, v):
        ran.append(word)
        return kernel(q, k, v)

    return call


def test_the_original_keeps_its_attention_and_its_weights_are_shared(pairs):
    model, fast = pairs("llama")
    assert (model.config._attn_implementation, fast.config._attn_implementation) == ("sdpa", NAME)
    assert not hasattr(model.config, BEFORE) and not any(hasattr(m, HELD) for m in model.modules())
    for (name, mine), other in zip(model.named_parameters(), fast.parameters(), strict=True):
        assert mine.data_ptr() == other.data_ptr(), name
        assert mine.requires_grad and not other.requires_grad


def test_another_dtype_goes_the_models_own_way(pairs):
    model, fast = pairs("llama")
    half, other = (copy.deepcopy(m).to(torch.bfloat16) for m in (model, fast))
    with torch.no_grad():
        assert torch.equal(half(**tokens()).logits, other(**tokens()).logits)


def test_gradients_go_the_models_own_way(pairs):
    model, fast = pairs("llama")
    found = []
    for each in (model, fast):
        rows = each.get_input_embeddings()(tokens()["input_ids"]).detach().requires_grad_()
        each(inputs_embeds=rows).logits.sum().backward()
        found.append(rows.grad)
    model.zero_grad()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kernels", ["of ours", "none for one query", "none on a short cache"])
def test_torch_compile_takes_it_whole(pairs, kernels):
    """Prompts without a mask and with one, and a step on a cache, whoever computes it: one graph each."""
    model, made = pairs("llama")
    fast = shared_copy(made)
    for layer in fast.model.layers:
        held = replace(getattr(layer.self_attn, HELD), least=1000 if kernels == "none on a short cache" else 0)
        held = replace(held, decode=None) if kernels == "none for one query" else held
        setattr(layer.self_attn, HELD, held)
    torch._dynamo.reset()
    compiled = torch.compile(fast.forward, backend="eager", fullgraph=True)
    given, one = tokens(), torch.full((2, 1), 5)
    with torch.no_grad():
        assert torch.allclose(compiled(given["input_ids"]).logits, model(given["input_ids"]).logits, atol=1e-4)
        past = [each(**given).past_key_values for each in (compiled, model)]
        steps = [each(one, past_key_values=cache).logits for each, cache in zip((compiled, model), past, strict=True)]
        assert torch.allclose(*steps, atol=1e-4)


@pytest.mark.parametrize(("name", "given"), [("snapkv", {"window": 3}), ("expected-attention", {})])
@pytest.mark.parametrize("padded", [0, 3])
def test_a_cache_that_forgets_around_kernels(pairs, name, given, padded):
    found = []
    for model in pairs("llama"):
        with attnopt.cache(name, keep=0.5, **given) as held:
            found.append(generated(model, tokens(length=16, padded=padded)))
        assert held.evicted == 16
    assert torch.equal(*found)


def test_compiled_with_a_cache_of_fixed_size(pairs):
    model, fast = pairs("llama")
    fast = compiled(fast)
    assert torch.equal(generated(fast, tokens(padded=2), cache_implementation="static"), generated(model, tokens(padded=2)))


@pytest.mark.exhaustive  # dynamo traces each length again
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_compiled_with_a_cache_that_forgets(pairs, keep):
    found = []
    for model in (pairs("llama")[0], compiled(pairs("llama")[1])):
        with attnopt.cache("snapkv", keep=keep, window=3):
            found.append(generated(model, tokens(length=16)))
    assert torch.equal(*found)


def compiled(model):
    """A copy whose forward dynamo traces; what the graph is compiled to is not ours to test."""
    made = copy.deepcopy(model)
    made.forward = torch.compile(made.forward, backend="eager")
    return made
