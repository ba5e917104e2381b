"""Layers whose attention goes to tokens that would be rounded are found by their index, and keep more bits in one form of the cache."""

from __future__ import annotations

import pytest
import torch
from live_models import generated, host_of, language_model, tokens

from attnopt.analysis.calibration import Calibration
from attnopt.errors import InputMismatch
from attnopt.hosts.eviction.live_forms import live_form
from attnopt.hosts.module.model import as_live
from attnopt.ir.by_layer import ByLayer, of_layer
from attnopt.ir.token_blocks import TokenBlocks
from attnopt.passes.kvcache.akvq_vl import AkvqVl
from attnopt.plan.judge.budget import Budget
from attnopt.plan.judge.quality import Loss
from attnopt.plan.live import coding
from attnopt.plan.live.coding import Coded, coded, forms
from attnopt.plan.live.text_layers import text_layers

GIVEN = AkvqVl(recent=2, pivots=2)


@pytest.fixture(scope="module")
def data():
    rows = torch.randint(2, 97, (32, 12), generator=torch.Generator().manual_seed(0))
    batches = tuple({"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows.split(8))
    return Calibration(batches, frozenset(("input_ids", "attention_mask")), True)


def test_the_layers_are_those_that_the_pass_finds(data):
    host = host_of("llama")
    assert text_layers(host, data, 0)(GIVEN) == [0, 1]  # random layers look everywhere
    assert text_layers(host, data, 0)(AkvqVl(recent=2, pivots=2, text=1.0)) == []


def test_layers_of_text_are_a_form_of_their_own(data, monkeypatch):
    model, losses = host_of("llama").model, Loss.of("mean KL", [0.1] * 16, 0)
    pivots, mixed = forms([GIVEN], lambda given: [1])
    found = live_form(mixed)
    assert isinstance(found, ByLayer) and str(found) == mixed
    assert (of_layer(found, 0), of_layer(found, 1).word("k")) == (live_form(pivots), "int4")
    monkeypatch.setattr(coding, "weighed", lambda m, o, d, words, seed: Coded(words, 90.0 if words == mixed else 100.0, losses))
    assert coded(model, model, data, Budget.of(50.0), [GIVEN], 0, of_text=lambda given: [1])[0] == mixed
    fast = as_live(language_model("llama").double(), None, None, {})  # torch rounds it: no kernel is compiled
    fast.cache_codes = mixed
    layers = generated(fast, tokens(), return_dict_in_generate=True).past_key_values.layers
    assert [layer.clause for layer in layers] == [of_layer(found, i) for i in range(2)]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("cache(k=int8, v=int8); layer 0: cache(k=int4, v=int4)", "names no layers"),
        (
            "cache(k=int8, v=int8); layers 0: cache(k=int4, v=int4, recent=4, k_axis=channel)",
            "kept like this: k_axis of the cache",
        ),
        ("cache(k=int4, v=int4); layers 0: " + TokenBlocks(4, 2).words_of_a_spec, "stand beside no others"),
    ],
)
def test_words_that_are_no_form(words, why):
    with pytest.raises(InputMismatch, match=why):
        live_form(words)
