"""Live models inside attnopt.cache: exact where nothing leaves, equal to a mask where something does, and clear where it cannot."""

from __future__ import annotations

import functools
import threading

import hf_models
import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import eager_attention_forward

import attnopt
from attnopt.errors import AttnoptError, InputMismatch
from attnopt.ir.packing import pack, unpack

build = functools.cache(hf_models.build)
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
IDS = torch.randint(2, hf_models.VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(0))
SMALL = {
    "sinks-window": {"sinks": 2},
    "snapkv": {"window": 3},
    "key-norm": {"whole": 0},
    "expected-attention": {"sinks": 2, "future": 8},
}
NAMES = ("sinks-window", "key-norm", "snapkv", "expected-attention")


def generated(model, ids=IDS, mask=None, **given):
    return model.generate(ids, attention_mask=mask, **GREEDY, **given)


def one_layer(attention="eager", **changed):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
        attn_implementation=attention, **changed,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("family", "attention", "name"),
    [*(("llama", "sdpa", name) for name in NAMES), ("llama", "eager", "snapkv"), ("gpt2", "sdpa", "expected-attention")],
)
def test_room_for_all_is_the_full_cache_token_for_token(family, attention, name):
    model = build(family, attention)
    with attnopt.cache(name, keep=1.0, **SMALL.get(name, {})) as held:
        found = generated(model)
    assert torch.equal(found, generated(model))
    assert held.evicted == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_is_kept_is_what_a_mask_of_the_full_computation_shows(name, attention):
    """Logits of the steps behind an eviction, heads of their own room: places, positions and masks are right, or they would differ."""
    model, prompt, steps = one_layer(attention), IDS[:1, :10], IDS[1:, :4]
    past = transformers.DynamicCache(config=model.config)
    found, shown = [], torch.ones(14, 14, dtype=torch.bool).tril()[None].repeat(2, 1, 1)
    with attnopt.cache(name, heads={0: (0.4, 0.7)}, every=None, **SMALL.get(name, {})) as held:
        model(prompt, past_key_values=past)
        places = held.layers[0].places[0]
        assert [int((p < 10).sum()) for p in places] == [4, 7]
        for g in range(2):
            gone = sorted(set(range(10)) - set(places[g].tolist()))
            shown[g, 10:, gone] = False
        for t in range(0, 4, 2):  # two tokens at a time
            found.append(model(steps[:, t : t + 2], past_key_values=past).logits)
    mask = torch.zeros(1, 4, 14, 14).masked_fill(~shown.repeat_interleave(2, 0)[None], torch.finfo(torch.float32).min)
    wanted = model(torch.cat([prompt, steps], 1), attention_mask=mask).logits[:, 10:]
    torch.testing.assert_close(torch.cat(found, 1), wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_sinks_and_window_is_the_masked_full_computation_at_every_step():
    model = build("llama", "sdpa")
    past = transformers.DynamicCache(config=model.config)
    with attnopt.cache("sinks-window", capacity=6, sinks=2) as held:
        model(IDS[:1, :4], past_key_values=past)
        found = torch.cat([model(IDS[:1, t : t + 1], past_key_values=past).logits for t in range(4, 14)], 1)
    q, k = torch.arange(14)[:, None], torch.arange(14)
    shown = (k <= q) & ((k < 2) | (q - k < 5))  # causal & (window(C - sinks + 1) | global(sinks))
    mask = torch.zeros(1, 1, 14, 14).masked_fill(~shown, torch.finfo(torch.float32).min)
    wanted = model(IDS[:1], attention_mask=mask).logits[:, 4:]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert held.layers[0].places[0].tolist() == [[0, 1, 10, 11, 12, 13]] * 2
    assert past.get_seq_length() == 14


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_padded_on_the_left_is_each_sequence_alone(name):
    model, chosen = build("llama", "sdpa"), {"keep": 0.5, "every": 3, **SMALL.get(name, {})}
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), IDS[1:, :9]], 1)
    ids, mask = torch.cat([IDS[:1], padded]), torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    with attnopt.cache(name, **chosen) as held:
        together = generated(model, ids, mask)
    with attnopt.cache(name, **chosen):
        first, second = generated(model, IDS[:1]), generated(model, IDS[1:, :9])
    assert torch.equal(together[0], first[0])
    assert torch.equal(together[1, 5:], second[0])
    assert held.evicted > 0


@torch.no_grad()
def test_a_cache_that_was_filled_before_forgets_from_then_on():
    model, mask = build("llama", "sdpa"), torch.ones(2, 14, dtype=torch.long)
    mask[1, :4] = 0
    past = model(IDS, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).past_key_values
    longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    with attnopt.cache("sinks-window", capacity=6, sinks=2) as held:
        model(IDS[:, :1], attention_mask=longer, past_key_values=past, position_ids=longer.sum(1, keepdim=True) - 1)
    assert held.layers[0].places[:, 0].tolist() == [[0, 1, 11, 12, 13, 14], [4, 5, 11, 12, 13, 14]]


def test_beams_are_reordered_with_what_they_hold():
    model = build("llama", "sdpa")
    with attnopt.cache("snapkv", keep=1.0, window=3):
        found = generated(model, num_beams=3)
    assert torch.equal(found, generated(model, num_beams=3))
    with attnopt.cache("snapkv", keep=0.5, window=3, every=2):
        again = [generated(model, num_beams=3) for _ in range(2)]
    assert torch.equal(*again)


def test_while_decoding_no_more_than_the_room_and_an_interval_is_held():
    model = build("llama", "sdpa")
    with attnopt.cache("snapkv", capacity=6, window=3, every=4) as held:
        generated(model)
    assert all(6 <= layer.places.shape[2] < 10 for layer in held.layers.values())
    assert held.bytes < held.whole_bytes
    assert "keep(" in str(held)


def test_a_prompt_may_come_in_pieces():
    model = build("llama", "sdpa")
    with attnopt.cache("expected-attention", keep=1.0):
        whole = generated(model, prefill_chunk_size=5)
    assert torch.equal(whole, generated(model))
    with attnopt.cache("snapkv", keep=0.5, window=3) as held:
        generated(model, prefill_chunk_size=5)
    assert held.layers[0].places.shape[2] == 7 + 4  # half of the prompt, and what was generated and read


def test_other_threads_go_on_as_before():
    model, found = build("llama", "sdpa"), []
    with attnopt.cache("snapkv", keep=0.5, window=3) as held:
        other = threading.Thread(target=lambda: found.append(model(IDS).past_key_values))
        other.start()
        other.join()
    assert held.layers == {}
    assert found[0].layers[0].keys.shape[2] == 14


def test_rows_in_codes_are_what_the_clause_means():
    """One layer, nothing evicted: equal to attention on rounded rows, which the prompt sees too."""
    model, exact = one_layer("sdpa"), transformers.DynamicCache()
    with torch.no_grad():
        model(IDS, past_key_values=exact)
        with attnopt.cache("snapkv", keep=1.0, store="int8") as held:
            model(IDS)
    clause, k, rows = attnopt.parse("softmax cache(k=int8, v=int8)").cache, held.layers[0].keys, exact.layers[0].keys
    assert torch.equal(k, unpack(pack(rows, clause, "k"), clause, "k", torch.float32))
    assert 0 < float((k - rows).abs().max()) < 0.02
    with attnopt.cache("snapkv", keep=0.5, window=3, store="int8") as held:
        generated(model)
    assert held.bytes < 0.8 * held.whole_bytes


def test_layers_with_a_window_keep_their_own_cache():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=32, sliding_window=6, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).eval()
    with attnopt.cache("snapkv", keep=0.5, window=3) as held:
        generated(model)
    assert list(held.layers) == [1]
    assert "softcap(50.0)" in str(held)
    assert held.left == {0: "a sliding window of 6 keeps its own cache"}
    with pytest.raises(AttnoptError, match=r"no layer .* a sliding window of 6"), attnopt.cache("snapkv", keep=0.5):
        generated(build("mistral", "sdpa"))


def test_registered_attentions_are_met_too():
    seen = []

    def noted(module, query, key, *rest, **given):
        seen.append(key.shape[2])
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(module, query, key, *rest, **given)

    transformers.AttentionInterface.register("noted", noted)
    transformers.AttentionMaskInterface.register("noted", transformers.masking_utils.sdpa_mask)
    with attnopt.cache("snapkv", keep=0.5, window=3):
        generated(one_layer("noted"))
    assert seen == [14, 8, 9, 10, 11]


def test_clear_errors_for_what_cannot_forget():
    model = build("llama", "sdpa")
    chosen = {"keep": 0.5, "window": 3}
    with pytest.raises(AttnoptError, match="StaticCache of StaticLayer cannot forget"), attnopt.cache("snapkv", **chosen):
        generated(model, cache_implementation="static")
    right = torch.ones(2, 14, dtype=torch.long)
    right[1, -4:] = 0
    with pytest.raises(InputMismatch, match="padded on the right"), attnopt.cache("snapkv", **chosen):
        generated(model, mask=right)
    with pytest.raises(AttnoptError, match="encoder and decoder"), attnopt.cache("snapkv", **chosen):
        generated(build("t5", "sdpa"))
    with attnopt.cache("snapkv", **chosen):
        past = model(IDS).past_key_values
        with pytest.raises(AttnoptError, match="active already"), attnopt.cache("snapkv", **chosen):
            pass
    with pytest.raises(AttnoptError, match="outside of"):
        model(IDS, past_key_values=past)
    with pytest.raises(AttnoptError, match="taken back"):
        past.crop(-1)
    assert transformers.Cache.update.__module__.startswith("transformers")


def test_an_attention_beside_the_interface_is_named():
    class Own(nn.Module):
        def forward(self, x, cache):
            k, _ = cache.update(x, x, 0)
            return k

    cache = transformers.DynamicCache()
    with pytest.raises(AttnoptError, match=r"AttentionInterface.*layer 0"), attnopt.cache("snapkv", keep=0.5):
        Own()(torch.zeros(1, 2, 3, 8), cache)
    with attnopt.cache("snapkv", keep=0.5) as held:  # a layer whose attention is gone counts its tokens by rows of one channel
        Own()(torch.zeros(1, 1, 3, 1), transformers.DynamicCache())
    assert list(held.left) == [0]


def test_keys_that_a_second_layer_reads_are_refused():
    model = one_layer("eager")
    attention = model.model.layers[0].self_attn
    read = type(attention).forward

    def twice(hidden_states, **given):
        found = read(attention, hidden_states, **given)
        k = given["past_key_values"].layers[0].keys
        function = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface("eager", eager_attention_forward)
        function(attention, torch.zeros(len(k), 4, hidden_states.shape[1], 8), k, k, given["attention_mask"], scaling=1.0)
        return found

    attention.forward = twice
    with pytest.raises(AttnoptError, match="whose keys several layers read"), attnopt.cache("snapkv", keep=0.5, window=3):
        generated(model)
