"""Which layers of a live model choose pages, what the report says of it, and what a folder keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from live_models import generated, language_model, tokens

import attnopt
from attnopt.codegen.tvm import page_attention
from attnopt.errors import InputMismatch
from attnopt.hosts.eviction.paged import page_choice
from attnopt.hosts.module import layer_attention
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.layer_attention import AttentionCall, LayerAttention
from attnopt.hosts.module.traceable import traceable
from attnopt.ir.expr import Term
from attnopt.ir.site import Refusal
from attnopt.live.records import dressed
from attnopt.plan.live.codes import held_by
from attnopt.plan.live.converting import Live, noted
from attnopt.plan.live.pages import PagesChooser, unfit
from attnopt.report.data import Report

HELD_LAYER = LayerAttention(
    "softmax scale(0.25) causal empty(zero)", AttentionCall(4, 2, 2, 16, 16, 0.25, None, True, None, "float32")
)
WORDS = "pages(4, 3, recent=1)"
SAID = (
    "live, decode on pages: all keys are read in 1 layers (the first 1 read all, as in the source)",
    f"live, decode on pages: tvm-pages in 1 layers, {WORDS}",
)


def with_call(**changes):
    return replace(HELD_LAYER, call=replace(HELD_LAYER.call, **changes))


@pytest.mark.parametrize(
    ("held", "why"),
    [
        (HELD_LAYER, ""),
        (with_call(softcap=30.0), ""),
        (replace(HELD_LAYER, mask=Term("causal")), "a plan hides keys"),
        (with_call(window=8), "keeps its own cache"),
        (replace(HELD_LAYER, device="cuda"), "runs on a CPU"),
        (with_call(value_heads=1), "not as many heads"),
        (with_call(width=512, value_width=512), "512"),
    ],
)
def test_which_layers_can(held, why):
    found = unfit(held, page_choice(WORDS))
    assert why in found and bool(found) == bool(why)


def idle_model(dense=1):
    """A live model whose layers hold no kernel, because their own attention was as fast."""
    original = language_model("llama")
    model = shared_copy(original)
    idle = {path: LayerAttention("softmax scale(0.25) causal empty(zero)", call) for path, call in noted(model, tokens()).items()}
    made, chooser = Live(model, idle=idle, windows=True), PagesChooser(idle, windows=True, dense=dense)
    return original, dressed(made, Report("cpu", "torch", "model", 0.0, ()), on_pages=chooser)


def test_pages_by_hand_are_said_and_kept_in_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(page_attention, "reader", lambda *_: Refusal("not compiled here"))
    monkeypatch.setattr(layer_attention, "SHORT", 1)
    original, fast = idle_model()
    given = tokens(length=20)
    fast.cache_pages = WORDS
    assert fast.report.notes == SAID
    fast.save_pretrained(tmp_path)
    again = attnopt.load(tmp_path)
    assert again.cache_pages == WORDS
    assert {path: x.on_pages for path, x in held_by(again).items()} == {path: x.on_pages for path, x in held_by(fast).items()}
    found = generated(fast, given)
    assert torch.equal(generated(again, given), found) and not torch.equal(found, generated(original, given))
    plain = traceable(fast)  # a model as it was, for graphs
    assert torch.equal(generated(plain, given), generated(original, given)) and "choose_pages" not in vars(plain)
    again.cache_pages = None
    assert torch.equal(generated(again, given), generated(original, given))


def test_what_a_plan_says_is_left_where_no_layer_can():
    _, fast = idle_model()
    chooser = fast.choose_pages
    assert chooser.planned(fast, None) == (None, [])
    assert chooser.planned(fast, WORDS) == (page_choice(WORDS), list(SAID))
    said = ["every query reads the whole cache: no layer can choose pages: the first 2 read all, as in the source"]
    assert replace(chooser, dense=2).planned(fast, WORDS) == (None, said)


def test_no_layer_that_chooses_is_an_error_that_says_why():
    _, fast = idle_model(dense=2)
    with pytest.raises(InputMismatch, match="no layer can choose pages: the first 2 read all, as in the source"):
        fast.cache_pages = WORDS
    assert fast.cache_pages is None and not held_by(fast)
