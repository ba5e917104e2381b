"""Heads narrower than a model's class makes them, in its live layers and in every cache."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from live_models import generated, host_of, tokens
from narrow_models import narrowed

from attnopt.cost.target import read
from attnopt.hosts.eviction.coded import bytes_per_token
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.interface import NAME
from attnopt.hosts.module.reshaping import Side, placed, widened
from attnopt.hosts.module.widths import WIDTHS
from attnopt.ir.layout import Axis
from attnopt.ir.site import Refusal
from attnopt.live.records import dressed, load_live
from attnopt.live.telling import lines
from attnopt.patterns import recognise
from attnopt.patterns.block import find_blocks
from attnopt.plan.live.converting import Live, live, noted, read_back
from attnopt.plan.live.layers import Chooser
from attnopt.report.data import Report

# Keys that turn keep their width, or are lifted when they are read; one layer makes q, k and v.
CASES = [("llama", 16, 8), ("llama", 8, 16), ("gpt2", 12, 8)]


@pytest.mark.parametrize(("family", "keys", "values"), CASES)
def test_the_live_model_computes_what_the_graph_does(family, keys, values):
    made, fast = narrowed(family, keys, values)
    with torch.no_grad():
        got = fast(**tokens(), use_cache=False).logits
        plain = host_of(family).model(**tokens(), use_cache=False).logits
    assert torch.allclose(got, made.runner()(tokens())[0], atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-3)


@pytest.mark.parametrize(("family", "keys", "values"), CASES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}], ids=str)
def test_generation_from_a_narrow_cache_is_generation_without(family, keys, values, options):
    _, fast = narrowed(family, keys, values)
    given = tokens(padded=3)
    found = generated(fast, given, return_dict_in_generate=True, **options)
    without = {name: value for name, value in options.items() if name == "num_beams"}
    assert torch.equal(found.sequences, generated(fast, given, use_cache=False, **without))
    for held in found.past_key_values.layers:
        assert (held.keys.shape[-1], held.values.shape[-1]) == (keys, values)


def test_another_function_of_transformers_reads_narrow_keys_alike():
    _, fast = narrowed("gpt2", 12, 8)
    assert fast.config._attn_implementation == NAME
    other = shared_copy(fast)
    other.set_attn_implementation("eager")
    assert torch.equal(generated(other, tokens(padded=3)), generated(fast, tokens(padded=3)))
    assert hasattr(host_of("gpt2").model.transformer.h[0].attn, WIDTHS) is False


def test_kernels_are_chosen_for_the_narrow_heads():
    calls = noted(narrowed("gpt2", 12, 8)[1], tokens())
    assert [(x.width, x.value_width, x.scaling) for x in calls.values()] == [(12, 8, 0.25)] * 2


def test_a_folder_keeps_the_widths(tmp_path):
    host, (made, fast) = host_of("gpt2"), narrowed("gpt2", 12, 8)
    plain = Report("cpu", "torch", "always", 0.0, ())
    kept = dressed(Live(shared_copy(fast), tuple(read_back(host, made))), plain)
    kept.save_pretrained(tmp_path)
    again = load_live(tmp_path)
    assert torch.equal(generated(again, tokens(padded=3)), generated(fast, tokens(padded=3)))
    assert bytes_per_token(again(**tokens()).past_key_values) == 2 * 4 * (12 + 8) * 4  # layers, heads, channels, bytes
    said = lines(Live(fast, tuple(read_back(host, made))), {})
    assert said == ["live, cache: keys of 12 and values of 8 channels, of 16, in 2 layers"]


def test_a_layer_that_does_not_run_so_is_a_refusal(monkeypatch):
    host, (made, _) = host_of("gpt2"), narrowed("gpt2", 12, 8)
    monkeypatch.setattr("attnopt.hosts.module.interface.own_way", lambda module, q, k, v, *rest, **given: (q.mT @ q @ v, None))
    found = live(host, read_back(host, made), tokens(), Chooser("always", read("cpu"), length=16), fuses=False)
    assert isinstance(found, Refusal) and "another width" in found.reason and found.node == "transformer.h.0.attn"


def twins(keys: int, values: int):
    """The first layer of a Llama, and the same as it would be with heads of these widths."""
    host = host_of("llama")
    site = recognise(host.graph).sites[0]
    (block,) = find_blocks(host.graph, [site])
    return host, (site, block), (replace(site, axes={**site.axes, "d": (Axis("d", keys),), "e": (Axis("e", values),)}), block)


@pytest.mark.parametrize(
    ("keys", "values", "path", "why"),
    [
        (8, 16, "model.layers.0.self_attn", "a rotation"),
        (16, 32, "model.layers.0.self_attn", "narrower heads only"),
        (16, 8, "model.layers.0.mlp", "takes none"),
    ],
)
def test_widths_that_a_layer_cannot_keep_are_refused(keys, values, path, why):
    host, old, new = twins(keys, values)
    refusal = widened(path, old, new, host.model)
    assert isinstance(refusal, Refusal) and why in refusal.reason and refusal.node == path


def test_channels_stand_where_the_class_looks_for_them():
    """Two sides of two heads each, mixed head by head in one layer of heads of 3 channels: the second side has 2."""
    wide = torch.arange(12).view(2, 2, 3)
    was = [SimpleNamespace(channels=wide[:, side]) for side in range(2)]
    now = [SimpleNamespace(channels=torch.zeros(2, width)) for width in (3, 2)]
    sides = [Side(*each) for each in zip("qk", was, now, strict=True)]
    assert placed(sides).tolist() == [0, 1, 2, 6, 7, 10, 3, 4, 5, 8, 9, 10]
    other = replace(sides[1], now=SimpleNamespace(channels=torch.zeros(1, 3)))
    assert placed([sides[0], other]) is None
    assert placed([other]).tolist() == [0, 1, 2]
