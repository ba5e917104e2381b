"""What a live model cannot hold, and models that have no function of transformers for their attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from live_models import host_of, language_model

from attnopt.errors import UnsupportedFormat
from attnopt.hosts.module.host import ModuleHost, require_interface
from attnopt.ir.spec import parse
from attnopt.patterns import recognise


@pytest.fixture(scope="module")
def host():
    return host_of("llama")


@pytest.mark.parametrize("change", ["cache", "score", "kernel"])
def test_changes_of_the_attention_itself_are_refused_with_a_way_out(host, change):
    refusal = host.refuses_change((change,), (), {})
    assert change in refusal.reason and "example_inputs" in refusal.remedy


@pytest.mark.parametrize("change", ["mask", "selection", "correction", "precision"])
def test_what_its_attention_function_computes_is_taken(host, change):
    (site, *_) = recognise(host.graph).sites
    assert host.refuses_change((change,), (site,), {}) is None
    odd = replace(site, spec=parse("softmax heads(4, 2) width(16) scale(0.25)"))
    refusal = host.refuses_change((change,), (odd,), {})
    assert "later keys" in refusal.reason and refusal.node == site.name


def test_another_mask_is_refused_where_the_cache_holds_a_window():
    host = host_of("mistral")
    (site, *_) = recognise(host.graph).sites
    assert "positions in it" in host.refuses_change(("mask",), (site,), {}).reason
    assert host.refuses_change(("precision",), (site,), {}) is None


def test_weights_and_other_heads_are_held_where_a_layer_hands_them_to_a_cache(host, monkeypatch):
    (site, *_) = recognise(host.graph).sites
    assert host.refuses_change(("weights",), (), {}) is None
    assert host.refuses_change(("structure",), (site,), {site.name: {"h": 2, "g": 1, "d": 16, "e": 16}}) is None
    assert host.refuses_change(("structure",), (site,), {site.name: {"e": 8}}) is None
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaAttention, "forward", lambda self, hidden_states: None)
    refusal = host.refuses_change(("structure",), (site,), {site.name: {"e": 8}})
    assert "takes none" in refusal.reason and refusal.node == site.source.module
    assert host.refuses_change(("structure",), (site,), {site.name: {"h": 2, "e": 16}}) is None


def test_a_copy_is_of_the_same_kind_and_model(host):
    twin = host.copy()
    assert isinstance(twin, ModuleHost) and twin.model is host.model and twin.module is not host.module


def test_a_model_that_writes_its_attention_out_is_an_error_with_the_layer():
    class Written(transformers.LlamaForCausalLM):
        _supports_attention_backend = False

    with pytest.raises(UnsupportedFormat, match=r"AttentionInterface.*model.layers.0.self_attn.*host=\"graph\""):
        require_interface(Written(language_model("llama").config))


def test_sites_stand_in_the_modules_that_made_them(host):
    paths = [s.source.module for s in recognise(host.graph).sites]
    assert paths == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(isinstance(host.model.get_submodule(p), torch.nn.Module) for p in paths)
