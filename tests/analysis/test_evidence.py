"""What a pass may ask: the same answers from both hosts, from a stream as from all data at once, and as the reference says."""

from __future__ import annotations

import functools

import hf_models
import onnx_exports
import pytest
import torch

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.analysis.operands import held, tapped
from attnopt.analysis.statistics import BUCKETS
from attnopt.analysis.store import Store
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.reference import attend
from attnopt.opening import open_model
from attnopt.patterns import recognise

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def inputs(family, length, padding):
    made = hf_models.inputs(family, padding=padding, length=length)
    return {name: x for name, x in made.items() if isinstance(x, torch.Tensor)}


@functools.cache
def opened(family, kind):
    """A host with its sites and named batches of two lengths, padded on either side."""
    options = {name: x for name, x in hf_models.inputs(family).items() if not isinstance(x, torch.Tensor)}
    if kind == "onnx":
        options = {}
    model = hf_models.build(family) if kind == "torch" else onnx_exports.export(family, "eager", "dynamo")
    given = open_model(model, {**inputs(family, 12, "right"), **options}, dynamic_shapes=None, need_inputs=True)
    batches = [given.host.named_inputs({**inputs(family, *how), **options}) for how in ((12, "right"), (9, "left"))]
    return given.host, recognise(given.host.graph).sites, Calibration.of(given.host.graph, batches)


def evidence(family="llama", kind="torch", **options):
    host, sites, data = opened(family, kind)
    return Evidence(host, data, sites=sites, **options)


def layers(found):
    return [n for n in found.host.graph.nodes if found.linear(n) is not None]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_both_hosts_agree(family):
    one, two = evidence(family), evidence(family, "onnx")
    assert one.samples == two.samples == 4
    mine, others = layers(one), layers(two)
    assert len(mine) == len(others) > 8
    for a, b in zip(mine, others, strict=True):
        x, y = one.linear(a).input, two.linear(b).input
        assert x.rows == y.rows
        for name in ("mean", "variance", "low", "high"):
            torch.testing.assert_close(getattr(x, name), getattr(y, name), **CLOSE)
        torch.testing.assert_close(one.second_moment(a), two.second_moment(b), **CLOSE)
    assert len(one.sites) == len(two.sites) == hf_models.ATTENTIONS[family]
    for a, b in zip(one.sites, two.sites, strict=True):
        x, y = one.attention(a), two.attention(b)
        assert (x.rows, x.q.rows, x.k.rows) == (y.rows, y.q.rows, y.k.rows)
        for name in ("mass", "entropy", "peak", "total"):
            torch.testing.assert_close(getattr(x, name), getattr(y, name), **CLOSE)
        for name in "qkv":
            torch.testing.assert_close(getattr(x, name).max_abs, getattr(y, name).max_abs, **CLOSE)


def test_padding_counts_nowhere():
    """Token ids under the mask change nothing that is measured."""
    host, sites, data = opened("llama", "torch")
    changed = [dict(b, input_ids=torch.where(b["attention_mask"] > 0, b["input_ids"], 7)) for b in data.batches]
    assert not torch.equal(changed[0]["input_ids"], data.batches[0]["input_ids"])
    other = Evidence(host, Calibration.of(host.graph, changed), sites=sites)
    mine = evidence()
    real = sum(int(b["attention_mask"].sum()) for b in data.batches)
    for node in layers(mine):
        assert mine.linear(node).input.rows == real
        torch.testing.assert_close(mine.linear(node).input.mean, other.linear(node).input.mean, rtol=1e-6, atol=1e-9)
    for site in sites:
        assert mine.attention(site).rows == mine.attention(site).k.rows == real
        torch.testing.assert_close(mine.attention(site).mass, other.attention(site).mass, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_the_stream_equals_all_rows_at_once(kind):
    found = evidence(kind=kind)
    node = layers(found)[3]
    rows = torch.cat([x[b["attention_mask"].bool()] for b, (x,) in found.hold([node.inputs[0]])]).double()
    assert found.linear(node).input.rows == len(rows)
    torch.testing.assert_close(found.linear(node).input.variance, rows.var(0, correction=0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.second_moment(node), rows.T @ rows / len(rows), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_attention_is_what_the_reference_weighs(family, monkeypatch):
    """Mass, entropy and peak against the whole weight matrices; the blocks are made as small as a row."""
    monkeypatch.setattr("attnopt.analysis.attention_mass.SCORES", 1)
    found = evidence(family)
    for site in found.sites:
        statistics, shares, near = found.attention(site), [], []
        for given, data in found.hold(tapped(site)):
            on = held(site, dict(zip(tapped(site), data, strict=True)), found.host.graph.sizes(given))
            weights = attend(site.spec, on.q, on.k, on.v, **on.operands).weights.double()
            masks = [given[n] for n in ("attention_mask", "decoder_attention_mask") if n in given]
            real = next(
                (m.bool() for m in masks if m.shape[1] == weights.shape[2]), torch.ones(weights.shape[0], weights.shape[2]) > 0
            )
            distance = (torch.arange(weights.shape[2])[:, None] - torch.arange(weights.shape[3])).clamp(min=-1)
            kept = (distance >= 0) & (distance < 4) | (torch.arange(weights.shape[3]) < 2)
            near += [(weights[i] * kept).sum(-1)[:, real[i]] for i in range(len(weights))]
            shares += [weights[i][:, real[i]] for i in range(len(weights))]
        rows = sum(s.shape[1] for s in shares)
        assert statistics.rows == rows
        torch.testing.assert_close(statistics.kept(2, 4), sum(n.sum(-1) for n in near) / rows, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(statistics.peak, sum(s.amax(-1).sum(-1) for s in shares) / rows, rtol=1e-5, atol=1e-6)
        entropy = sum(torch.special.entr(s).sum((-2, -1)) for s in shares) / rows
        torch.testing.assert_close(statistics.entropy, entropy, rtol=1e-4, atol=1e-6)


def test_attention_is_what_the_model_weighs():
    """Against the model's own weights, which know nothing of specs."""
    found, model = evidence("llama"), hf_models.build("llama")
    for layer, site in enumerate(found.sites):
        sums, rows = 0.0, 0
        for given in found.calibration.batches:
            with torch.no_grad():
                weights = model(**given, output_attentions=True).attentions[layer].double()
            real = given["attention_mask"].bool()
            sums = sums + (weights[..., :2].sum(-1) * real[:, None]).sum((0, 2))
            rows += int(real.sum())
        torch.testing.assert_close(found.attention(site).kept(first=2), sums / rows, rtol=1e-4, atol=1e-6)
        assert found.attention(site).mass.shape == (4, BUCKETS, 2 * BUCKETS)


def test_without_data_nothing_is_known():
    host, sites, _ = opened("llama", "torch")
    empty, full = Evidence(host, sites=sites), evidence()
    node = layers(full)[0]
    assert (empty.linear(node), empty.second_moment(node), empty.attention(sites[0])) == (None, None, None)
    other = next(n for n in host.graph.nodes if n.op == "add")
    assert (full.linear(other), full.second_moment(other)) == (None, None)


def test_second_moments_come_in_groups_that_memory_holds():
    small, large = evidence(memory=1), evidence()
    for node in layers(large):
        assert torch.equal(small.second_moment(node), large.second_moment(node))
        assert len(small._moments) == 1


def test_a_copy_of_the_host_is_known_by_name():
    found = evidence("llama", "onnx")
    copy = found.host.copy()
    sites = recognise(copy.graph).sites
    assert found.attention(sites[1]) is found.attention(found.sites[1])
    again = [n for n in copy.graph.nodes if found.linear(n) is not None]
    assert [n.name for n in again] == [n.name for n in layers(found)]


def test_a_second_run_reads_what_the_first_kept(tmp_path, monkeypatch):
    first = evidence(store=Store.open(tmp_path))
    node = layers(first)[2]
    kept = first.linear(node).input, first.second_moment(node), first.attention(first.sites[1])
    monkeypatch.setattr(type(first.host), "tapper", lambda *a: pytest.fail("measured again"))
    again = evidence(store=Store.open(tmp_path))
    assert torch.equal(again.linear(node).input.variance, kept[0].variance)
    assert torch.equal(again.second_moment(node), kept[1])
    assert torch.equal(again.attention(first.sites[1]).mass, kept[2].mass)


def test_other_data_or_weights_are_other_measurements(tmp_path):
    first = evidence(store=Store.open(tmp_path))
    host, _, data = opened("llama", "torch")
    fewer = Evidence(host, Calibration.of(host.graph, data.batches[:1]), store=Store.open(tmp_path))
    assert first.key("x") != fewer.key("x") != evidence().key("x")
    other = Evidence(OnnxHost.from_model(onnx_exports.export("llama", "eager", "dynamo")), data, store=Store.open(tmp_path))
    assert first.key("x") != other.key("x")
