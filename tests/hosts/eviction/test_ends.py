"""A live cache that keeps its first and newest tokens exactly computes what its clause says at every call, and goes back and on alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from live_models import generated, language_model, tokens

import attnopt
from attnopt.codegen.tvm import piece_attention
from attnopt.errors import AttnoptError, InputMismatch
from attnopt.hosts.eviction.coded import CodedLayer, fresh
from attnopt.hosts.eviction.ends import BACK, Ends
from attnopt.hosts.eviction.live_forms import live_form
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.interface import HELD, attnopt_attention
from attnopt.hosts.module.layer_attention import AttentionCall, LayerAttention
from attnopt.hosts.module.model import as_live
from attnopt.ir.evaluate import Grid
from attnopt.ir.kv_cache import attend_cache
from attnopt.ir.reference import reference
from attnopt.ir.rows import Call
from attnopt.ir.spec import parse
from attnopt.ir.storage import round_cache
from attnopt.plan.live.codes import with_kernel

BITS = "k_bits=where(k < {0}3, 16, 2), v_bits=where(k < {0}3, 16, 2)"
REST = "scales=fp16, group=128, k_basis=hadamard, v_basis=hadamard"
PIVOTS = f"cache(k=int2, v=int2, {BITS.format('')}, clip=0.8, recent=5, {REST})"
WIDE = PIVOTS.replace("recent=5", "recent=8").replace("group=128", "group=32")
FORMS = {
    PIVOTS: f"cache(k=int2, v=int2, {BITS.format('load(start, b) + ')}, clip=0.8, recent=5, {REST})",
    f"cache(k=int4, v=int4, recent=5, {REST})": f"cache(k=int4, v=int4, recent=5, {REST})",
}


@pytest.fixture(scope="module")
def model():
    return language_model("llama")


def in_form(model, words):
    fast = as_live(shared_copy(model), None, None, {})
    fast.cache_codes = words
    return fast


def by_hand(words, start):
    """The model on a cache of exact tokens, whose attention rounds them at every call as a spec with this clause says."""

    def attend(module, q, k, v, mask, scaling, **kwargs):
        seen = torch.ones(len(q), 1, q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        seen = seen & (torch.arange(k.shape[2]) >= start[:, None])[:, None, None]
        spec = f"softmax heads(4, 2) scale({scaling!r}) load(seen, b, q, k) {words}"
        return reference(spec, q, k, v, seen=seen[:, 0], start=start.to(q)).transpose(1, 2), None

    name = f"ends-by-hand-{abs(hash(words))}"
    transformers.AttentionInterface.register(name, attend)
    transformers.AttentionMaskInterface.register(name, transformers.masking_utils.eager_mask)
    made = language_model("llama")
    made.set_attn_implementation(name)
    return made


@pytest.mark.parametrize("words", FORMS)
@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
def test_prompts_and_new_tokens_are_those_of_the_spec(words, way):
    """In float64, where no last bit moves a number over the border between two codes; rows that are padded have their own first tokens."""
    rows = 1 if "prompt_lookup_num_tokens" in way else 2
    given = tokens(rows=rows, padded=0 if rows == 1 else 2)
    start = (1 - given["attention_mask"]).sum(1).repeat_interleave(way.get("num_beams", 1))
    plain, fast = by_hand(FORMS[words], start).double(), in_form(language_model("llama").double(), words)
    asked = {"return_dict_in_generate": True, "output_logits": True, **way}
    out, expected = (generated(m, given, 10, **asked) for m in (fast, plain))
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), rtol=1e-9, atol=1e-9)
    assert all(isinstance(layer.k, Ends) for layer in out.past_key_values.layers)


def test_however_tokens_come_and_go_they_are_read_as_the_clause_says():
    clause, x = live_form(PIVOTS), torch.randn(2, 2, 160, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    held, at = Ends.empty(clause, "k"), 0
    for count in (2, 1, 1, 7, *[1] * 20, 40, 3, *[1] * 30):
        held, at = held.grown(x[:, :, at : at + count]), at + count
        if at in (20, 77):
            held, at = held.cut(at - 6), at - 6
        call = Call(parse(f"softmax {PIVOTS}"), Grid(2, 2, 1, at), {}, x.dtype)
        torch.testing.assert_close(held.read(), round_cache(call, x[:, :, :at], clause, "k"), rtol=1e-12, atol=1e-12)
    with pytest.raises(AttnoptError, match=f"Guess at most {BACK} tokens"):
        held.cut(at - 60)


def test_what_is_rounded_is_never_rounded_again():
    """A row of codes is written once: between two full sets of tokens a step leaves all codes where they are."""
    x = torch.randn(1, 2, 70, 16, dtype=torch.float64)  # which torch rounds: no kernel is compiled
    held, x = Ends.empty(live_form(PIVOTS), "k").grown(x[:, :, :40]), x[:, :, 40:]
    written = []
    for i in range(30):
        before, held = held, held.grown(x[:, :, i : i + 1])
        written.append(held.coded.length - before.coded.length)
        assert torch.equal(held.coded.packed.codes[:, :, : before.coded.length], before.coded.packed.codes)
    assert sorted(set(written)) == [0, 6] and sum(written) == 30  # five that are still read exactly, with the one that is not


def test_one_query_reads_pieces_and_nothing_back(monkeypatch):
    """What the kernels of the pieces compute is compared in tests/codegen/test_cache_pieces.py: here the reference stands for them."""

    def by_reference(line, q, cache):
        made = attend_cache(line, q, cache)
        ran.append(cache.k.shape[2])
        return made.output, made.lse.float()

    words, ran = WIDE, []
    monkeypatch.setattr(piece_attention, "by_tvm", by_reference)
    held = LayerAttention("softmax scale(0.2)", AttentionCall(4, 2, 2, 32, 32, 0.2, None, True, None, "float64"))
    layer, module, random = CodedLayer(live_form(words)), torch.nn.Module(), torch.Generator().manual_seed(0)
    setattr(module, HELD, replace(held, on_codes=with_kernel(held, layer.clause, "tvm-pieces")))
    k, v = (torch.randn(2, 2, 40, 32, generator=random, dtype=torch.float64) for _ in range(2))
    q = torch.randn(2, 4, 1, 32, generator=random, dtype=torch.float64)
    layer.hands_codes = True
    layer.update(k[:, :, :39], v[:, :, :39])
    stored = layer.update(k[:, :, 39:], v[:, :, 39:])
    found, _ = attnopt_attention(module, q, *stored, None, scaling=0.2)
    assert stored[0].found is None and stored[1].found is None and ran == [3 + 8, 40 - 3 - 8]
    right = reference(f"softmax scale(0.2) {words}", q, k, v)
    torch.testing.assert_close(found.transpose(1, 2), right, rtol=1e-4, atol=1e-4)


def test_what_it_refuses(model):
    fast = in_form(model, PIVOTS)
    with attnopt.cache("sinks-window", keep=0.5), pytest.raises(AttnoptError, match=r"cannot forget others.*cache_codes = None"):
        generated(fast, tokens())
    with (
        pytest.raises(InputMismatch, match=r"k_basis of the cache.*Write store"),
        attnopt.cache("sinks-window", keep=0.5, store=PIVOTS),
    ):
        pass


def test_a_cleared_cache_and_one_of_exact_tokens_begin_anew():
    """Their rows may be padded otherwise than before."""
    model = language_model("llama").double()  # which torch rounds: no kernel is compiled
    fast, given = in_form(model, PIVOTS), tokens(padded=2)
    with torch.no_grad():
        expected = fast(**given).logits
        cache = fresh(fast, live_form(PIVOTS))
        fast(tokens()["input_ids"], past_key_values=cache)
        cache.reset()
        assert torch.equal(fast(**given, past_key_values=cache).logits, expected)
        exact = model(given["input_ids"][:, :11], attention_mask=given["attention_mask"][:, :11]).past_key_values
        fast(given["input_ids"][:, 11:], attention_mask=given["attention_mask"], past_key_values=exact)
    torch.testing.assert_close(exact.layers[0].keys, cache.layers[0].keys)  # of the first layer, which reads no cache before
