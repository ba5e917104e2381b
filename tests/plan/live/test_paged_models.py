"""A model that is optimised for steps on long caches chooses pages, and its plan and its folder say so."""

from __future__ import annotations

import pytest
import torch
from live_models import generated, language_model, tokens

import attnopt
from attnopt.codegen.tvm import page_attention
from attnopt.hosts.eviction.paged import PagedLayer
from attnopt.hosts.module import layer_attention
from attnopt.ir.site import Refusal
from attnopt.passes.edits.caches.pages import Pages
from attnopt.plan.live import paging
from attnopt.plan.timing.timing import Timing
from attnopt.report.plan import Plan

WORDS = "pages(4, 3, recent=1, group=max)"
FASTER = {"plain": Timing((1.0,)), "whole": Timing((1.0,)), "pages": Timing((0.5,))}


@pytest.fixture
def model(monkeypatch):
    """Of three layers, the last of which may choose; the operator is not compiled."""
    monkeypatch.setattr(page_attention, "reader", lambda *_: Refusal("not compiled here"))
    monkeypatch.setattr(layer_attention, "SHORT", 1)
    return language_model("llama", layers=3)


def test_steps_on_long_caches_read_pages(model, monkeypatch, tmp_path):
    monkeypatch.setattr(paging, "step_times", lambda *given: FASTER)
    monkeypatch.setattr(paging, "choices", lambda passes: [Pages(4, 3, True)] * len(passes))
    rows = torch.randint(2, 97, (32, 14), generator=torch.Generator().manual_seed(0))
    fast = attnopt.optimize(model, budget=5.0, calibration=[rows], passes=["quest"], shapes="decode:2048", select="model")
    assert (fast.cache_pages, fast.plan.cache_pages) == (WORDS, WORDS)
    assert f"one query reads {WORDS} of a cache: a step takes 0.50 of its time on 2048 tokens" in str(fast.report)
    assert f"live, decode on pages: tvm-pages in 1 layers, {WORDS}" in fast.report.notes
    fast.save_pretrained(tmp_path)
    again, given = attnopt.load(tmp_path), tokens(length=14)
    found = generated(again, given, 2, return_dict_in_generate=True)
    assert [x.choosing and x.choosing.size for x in found.past_key_values.layers] == [None, None, 4]
    assert torch.equal(found.sequences, generated(fast, given, 2))


@pytest.mark.exhaustive  # traces the model again
def test_a_plan_says_which_pages_are_read(model):
    plan = Plan("torch", "cpu", "torch", cache_pages="pages(4, 3, recent=1)")
    fast = attnopt.optimize(model, plan=plan, select="always")
    assert fast.cache_pages == fast.plan.cache_pages == "pages(4, 3, recent=1)"
    with torch.no_grad():
        assert all(type(x) is PagedLayer for x in fast(**tokens()).past_key_values.layers)
