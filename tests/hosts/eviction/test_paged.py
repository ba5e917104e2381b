"""A live model that chooses pages of its cache generates what its spec says: the prompt whole, then the pages of each token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from live_models import generated, language_model, tokens
from transformers import DynamicCache

import attnopt
from attnopt.codegen.tvm import page_attention
from attnopt.codegen.tvm.availability import missing
from attnopt.errors import AttnoptError, InputMismatch
from attnopt.hosts.eviction.coded import CodedLayer
from attnopt.hosts.eviction.layer import EvictingLayer
from attnopt.hosts.eviction.paged import PagedLayer, in_pages, page_choice
from attnopt.hosts.eviction.stored import storage
from attnopt.hosts.module import layer_attention
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.interface import HELD
from attnopt.hosts.module.layer_attention import LayerAttention
from attnopt.hosts.module.model import as_live
from attnopt.ir.reference import attend, reference
from attnopt.ir.site import Refusal
from attnopt.plan.live.converting import noted
from attnopt.plan.live.pages import PagesChooser, spec_of
from attnopt.selectors.pages import state_of

APART, TOGETHER = "pages(4, 3, recent=1)", "pages(4, 3, recent=1, group=max)"
PROMPT = 20


@pytest.fixture(autouse=True)
def in_torch(request, monkeypatch):
    """The operator without a kernel, which takes seconds to compile and has its own tests (codegen/tvm/test_page_attention.py)."""
    if "exhaustive" not in request.keywords:
        monkeypatch.setattr(page_attention, "reader", lambda *_: Refusal("not compiled here"))
    monkeypatch.setattr(layer_attention, "SHORT", 1)


@pytest.fixture(scope="module")
def model():
    return language_model("llama")


def chooser(model):
    """The first of two layers reads all."""
    calls = noted(model, tokens())
    idle = {path: LayerAttention("softmax scale(0.25) causal empty(zero)", call) for path, call in calls.items()}
    return PagesChooser(idle, windows=True, dense=1)


def in_form(model, words):
    fast = as_live(shared_copy(model), None, None, {}, choose_pages=chooser(model))
    fast.cache_pages = words
    return fast


def on_paths(model, change):
    for module in model.modules():
        held = getattr(module, HELD, None)
        if held is not None and held.on_pages.run is not None:
            setattr(module, HELD, replace(held, on_pages=change(held)))


def listening(model):
    """What ran: each call notes how many keys there were."""
    ran = []

    def noting(held):
        run = held.on_pages.run
        return replace(held.on_pages, run=lambda q, k, *rest: (ran.append(k.shape[2]), run(q, k, *rest))[1])

    on_paths(model, noting)
    return ran


def by_hand(words, prompt=PROMPT):
    """The model whose attention is the reference on the whole sequence at once: behind the prompt each query of layer 1 chooses."""

    def attention(module, q, k, v, mask, scaling, **kwargs):
        start = f"softmax heads(4, 2) scale({scaling!r}) causal"
        made = reference(start, q, k, v)
        if module.layer_idx == 1:
            made[:, :, prompt:] = reference(f"{start} {words}", q, k, v)[:, :, prompt:]
        return made.transpose(1, 2), None

    name = f"pages-by-hand-{abs(hash((words, prompt)))}"
    transformers.AttentionInterface.register(name, attention)
    transformers.AttentionMaskInterface.register(name, transformers.masking_utils.sdpa_mask)
    made = language_model("llama")
    made.set_attn_implementation(name)
    return made


def plainly(held):
    """The meaning of the operator in plain torch, of any dtype."""
    line = str(spec_of(held, held.on_pages.clause))
    run = lambda q, k, v, low, high: attend(line, q, k, v, page_minima=low, page_maxima=high).output  # noqa: E731
    return replace(held.on_pages, run=run)


@pytest.mark.parametrize("words", [APART, TOGETHER])
def test_new_tokens_are_those_of_the_spec(model, words):
    """In float64, where no last bit moves a bound past another; by the operator the same tokens."""
    given = tokens(length=PROMPT)
    fast = in_form(model, words)
    ran = listening(fast)
    asked = {"use_cache": True, "return_dict_in_generate": True, "output_logits": True}
    out = generated(fast, given, **asked)
    assert ran == [*range(PROMPT + 1, PROMPT + 8)]
    exact = in_form(model, words).double()
    for module in exact.modules():
        if hasattr(module, HELD):
            held = getattr(module, HELD)
            setattr(module, HELD, replace(held, call=replace(held.call, dtype="float64")))
    on_paths(exact, plainly)
    found = generated(exact, given, **asked)
    expected = generated(by_hand(words).double(), given, **{**asked, "use_cache": False})
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), rtol=1e-3, atol=1e-3)
    first, second = out.past_key_values.layers
    assert isinstance(first, PagedLayer) and first.bounds is None
    assert torch.equal(second.bounds.state.low, state_of(second.keys, 4).low)
    assert second.bytes == second.k.bytes + second.v.bytes + second.bounds.bytes


@pytest.mark.exhaustive  # compiles two kernels
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("words", [APART, TOGETHER])
def test_new_tokens_by_the_kernel(model, words):
    given = tokens(length=PROMPT)
    assert torch.equal(generated(in_form(model, words), given), generated(by_hand(words), given, use_cache=False))


def test_beams_choose_by_their_own_pages(model):
    given = tokens(rows=1, length=PROMPT)
    found = generated(in_form(model, APART), given, num_beams=3)
    assert torch.equal(found, generated(by_hand(APART), given, num_beams=3, use_cache=False))


def test_what_has_a_mask_or_few_keys_or_no_choice_is_read_whole(model):
    fast = in_form(model, APART)
    ran = listening(fast)
    padded = tokens(length=PROMPT, padded=3)
    assert torch.equal(generated(fast, padded), generated(model, padded))
    short = tokens(length=4)
    assert torch.equal(generated(fast, short), generated(model, short)) and not ran  # 11 keys, and 12 are read
    fast.cache_pages = None
    out = generated(fast, tokens(length=PROMPT), return_dict_in_generate=True)
    assert torch.equal(out.sequences, generated(model, tokens(length=PROMPT)))
    assert type(out.past_key_values.layers[1]) is not PagedLayer


def test_several_queries_read_all_and_what_is_taken_back_leaves_right_bounds(model):
    fast, ids = in_form(model, APART), tokens(length=24)["input_ids"]
    with torch.no_grad():
        past = fast(ids[:, :14]).past_key_values
        whole = model(ids).logits[:, 14:]
        torch.testing.assert_close(fast(ids[:, 14:], past_key_values=past).logits, whole)
        past.crop(-7)
        layer = past.layers[1]
        assert past.get_seq_length() == 17 and torch.equal(layer.bounds.state.high, state_of(layer.keys, 4).high)
        again = fast(ids[:, 17:18], past_key_values=past).logits
        expected = by_hand(APART, 17)(ids[:, :18], use_cache=False).logits[:, 17:]
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
        past.batch_select_indices(torch.tensor([1]))
        assert torch.equal(layer.bounds.state.low, state_of(layer.keys, 4).low) and layer.keys.shape[0] == 1
        past.reset()
        assert past.get_seq_length() == 0 and fast(ids, past_key_values=past).past_key_values.get_seq_length() == 24


def test_a_cache_of_before_and_one_without_a_configuration_get_bounds(model):
    fast, ids = in_form(model, APART), tokens(length=PROMPT)["input_ids"]
    with torch.no_grad():
        for past in (model(ids).past_key_values, fast(ids, past_key_values=DynamicCache()).past_key_values):
            fast(ids[:, :1], past_key_values=past)
            assert [type(x) for x in past.layers] == [PagedLayer] * 2
            assert past.layers[0].bounds is None and past.layers[1].bounds.length == PROMPT + 1


def test_a_policy_forgets_tokens_and_what_is_left_is_read_whole(model):
    fast, given = in_form(model, APART), tokens(length=PROMPT)
    ran = listening(fast)
    with attnopt.cache("sinks-window", keep=1.0) as held:
        found = generated(fast, given)
    assert isinstance(held.layers[1], EvictingLayer) and not ran
    assert torch.equal(found, generated(model, given))
    with torch.no_grad():
        past = fast(given["input_ids"]).past_key_values
        with attnopt.cache("sinks-window", keep=1.0):
            fast(given["input_ids"][:, :1], past_key_values=past)
    assert isinstance(past.layers[1], EvictingLayer) and past.layers[1].seen == PROMPT + 1


def test_what_cannot_be_is_said(model):
    fast = in_form(model, APART)
    with pytest.raises(InputMismatch, match=r"no bounds by which pages.*cache_pages = None"):
        fast.cache_codes = "int8"
    with pytest.raises(AttnoptError, match=r"a StaticCache of .* cannot hold them.*model.cache_pages = None"):
        generated(fast, tokens(), cache_implementation="static")
    with pytest.raises(AttnoptError, match="moved between devices"):
        in_pages(DynamicCache(offloading=True), {1: 4})
    coded = DynamicCache()
    coded.layers.append(CodedLayer(storage("int8")))
    with pytest.raises(AttnoptError, match="of CodedLayer cannot hold them"):
        in_pages(coded, {0: 4})
    fast.cache_pages = None
    fast.cache_codes = "int8"
    with pytest.raises(InputMismatch, match="stored as int8"):
        fast.cache_pages = APART
    for words in ("pages(4, 3)", "block_topk(4, 4)", "pages(4, 3, recent=1, low=a, high=b)"):
        with pytest.raises(InputMismatch, match=r"no choice of pages.*Write"):
            page_choice(words)
    assert page_choice(None) is None


def test_layers_with_a_window_keep_their_own_cache():
    model = language_model("gemma2")
    fast = as_live(shared_copy(model), None, None, {}, choose_pages=replace(chooser(model), dense=0))
    fast.cache_pages = APART
    out = generated(fast, tokens(length=PROMPT), return_dict_in_generate=True)
    assert sorted(type(x).__name__ for x in out.past_key_values.layers) == ["DynamicSlidingWindowLayer", "PagedLayer"]


@pytest.mark.parametrize(("length", "chooses"), [(8 * 12 - 1, False), (8 * 12, True)])
def test_a_cache_hardly_longer_than_what_is_read_is_read_whole(model, monkeypatch, length, chooses):
    monkeypatch.setattr(layer_attention, "SHORT", 8)
    held = [m.attnopt_held for m in in_form(model, APART).modules() if getattr(m, "attnopt_held", None)][-1]
    assert (held.of_pages(torch.zeros(1, 4, 1, 16), length, 4, True, {}) is not None) == chooses
