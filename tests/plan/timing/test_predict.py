"""Kernels chosen by prediction: what is taken, what is said, and that nothing runs."""

from __future__ import annotations

import pytest
import torch
from hosts.onnx import small_models

from attnopt.codegen.library.local_attention import LocalAttention
from attnopt.codegen.library.multi_head_attention import MultiHeadAttention
from attnopt.cost.estimate import estimate
from attnopt.cost.target import load_target
from attnopt.hosts.onnx import OnnxHost
from attnopt.hosts.single_attention import example, single_attention
from attnopt.patterns import recognise
from attnopt.plan.calibrate.kernel_points import under_spec
from attnopt.plan.choose import choose
from attnopt.plan.timing.predict import DOUBT, ORIGINAL, best, example_shapes, heads_first, predicted

H200 = load_target("h200")[0]
WINDOW = "softmax scale(0.125) causal & window(64)"


def windowed(length):
    host = single_attention("onnx", {"b": 1, "h": 4, "g": 4, "q": length, "k": length, "d": 64, "e": 64})
    return host, under_spec(host, WINDOW)


def test_a_window_on_a_long_text_is_cut_in_chunks():
    host, site = windowed(4096)
    shapes = example_shapes(host, site, {"q": torch.empty(1, 4, 4096, 64), "k": torch.empty(1, 4, 4096, 64)})
    assert shapes == [(1.0, {"b": 1, "h": 4, "g": 4, "q": 4096, "k": 4096, "d": 64, "e": 64})]
    times = predicted(site, [MultiHeadAttention(), LocalAttention()], H200, shapes, host="onnx")
    assert list(times) == [ORIGINAL, "ort-mha", "local-attention"]
    name, why = best(site, times)
    assert name == "local-attention"
    assert why.startswith("predicted ") and "x the original's speed (bound by" in why


def test_several_shapes_are_weighed():
    _, site = windowed(256)
    short, long = ({"b": 1, "h": 4, "g": 4, "q": n, "k": n, "d": 64, "e": 64} for n in (256, 8192))
    alone = [estimate(site.spec, s, "float32", "ort-mha", target=H200).seconds for s in (short, long)]
    both = predicted(site, [MultiHeadAttention()], H200, [(0.75, short), (0.25, long)], host="onnx")["ort-mha"]
    assert both.seconds == pytest.approx(0.75 * alone[0] + 0.25 * alone[1])


def test_one_node_stays_unless_the_gain_is_clear():
    host = OnnxHost.from_model(small_models.attention(23, ("batch", 4, "length", 8)))
    (site,) = recognise(host.graph).sites
    slow, fast, tie = (
        estimate("softmax", {"b": 1, "h": 4, "g": 4, "q": q, "k": q, "d": 8, "e": 8}, target=H200) for q in (4000, 64, 3990)
    )
    assert best(site, {ORIGINAL: slow, "fast": fast})[0] == "fast"
    kept, why = best(site, {ORIGINAL: slow, "tie": tie})
    assert kept == ORIGINAL
    assert why.startswith("one kernel already; the best other, tie, is predicted 1.")
    assert 0 < DOUBT < 1


def test_a_spelled_out_attention_stays_where_the_kernels_are_slower():
    _, site = windowed(256)
    quick, slow = (
        estimate(site.spec, {"b": 1, "h": 4, "g": 4, "q": q, "k": q, "d": 64, "e": 64}, target=H200) for q in (256, 2048)
    )
    assert best(site, {ORIGINAL: quick, "slow": slow})[0] == ORIGINAL
    assert best(site, {ORIGINAL: quick, "tie": quick})[0] == "tie"


def test_the_layout_of_the_queries():
    _, site = windowed(128)
    assert heads_first(site)


def test_nothing_runs_and_every_kernel_is_listed(monkeypatch):
    host, site = windowed(512)
    monkeypatch.setattr("attnopt.plan.choose.in_turn", None)
    shape = {"b": 1, "h": 4, "g": 4, "q": 512, "k": 512, "d": 64, "e": 64}
    (chosen,) = choose(host, [site], example(shape), runtime="onnxruntime", opset=host.opset, select="model", target=H200)
    assert chosen.lowering.name == "local-attention"
    said = {c.kernel: c.why for c in chosen.choices}
    assert said[ORIGINAL].startswith("predicted ") and said["ort-mha"].startswith("predicted ")
    assert said["ort-gqa"].startswith("predicted ")
    (unknown,) = choose(host, [site], {}, runtime="onnxruntime", opset=host.opset, select="model", target=H200)
    assert unknown.why == "not predicted: a length is only known when the model runs"
