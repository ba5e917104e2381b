"""Sinks plus window: the spec that is asked for, its order, its refusals; on recall it fails exactly where the pair is dropped."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import hf_models
import pytest
import torch
from self_attention import SelfAttention

from attnopt.codegen import LOWERINGS
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Refusal
from attnopt.passes import SinksWindow
from attnopt.patterns import recognise
from attnopt.plan.choose import emit
from attnopt.plan.options.groups import Grouping

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
import trained_models
from recall_task import recall_batch


def evidence(dropped=lambda first, window: 0.5 ** (window + first)):
    """As calibration would say: the share of each of two heads that sinks and a window leave out."""

    def kept(first, window, lookahead):
        return 1 - torch.tensor([0.5, 1.5]) * dropped(first, window)

    seen = SimpleNamespace(kept=kept, v=SimpleNamespace(max_abs=torch.tensor([1.0, 4.0])))
    return SimpleNamespace(attention=lambda site: seen)


def groups(host):
    return Grouping(host, recognise(host.graph).sites).of("site")


def rewritten(host, kind, lowering, windows=(24, 8)):
    """Every site with the candidate of this kind, computed by one lowering."""
    made, replaced = host.copy(), {}
    kernel = next(x for x in LOWERINGS if x.name == lowering)
    specs = []
    for group in groups(made):
        candidate = next(
            c
            for c in SinksWindow(sinks=(4,), windows=windows).propose(group, evidence(lambda first, window: 1 / window))
            if c.kind == kind
        )
        (site,) = SinksWindow().apply(candidate, group).sites
        specs.append((str(group.sites[0].spec), str(site.spec)))
        replaced[site.output.value] = emit(made, site.reading(replaced), kernel)
    made.finish()
    return made, specs


def model_with_mask(model, ids, sinks, window):
    """The model itself under a mask of four dimensions."""
    place = torch.arange(ids.shape[1])
    distance = place[:, None] - place
    seen = (distance >= 0) & ((distance < window) | (place < sinks))
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min).expand(len(ids), 1, -1, -1)
    with torch.no_grad():
        return model(ids, attention_mask=bias, use_cache=False).logits


def test_the_rewritten_model_is_the_model_with_the_mask():
    model = hf_models.build("llama", "sdpa", layers=1)
    ids = torch.randint(0, hf_models.VOCABULARY, (2, 150))
    model.config.use_cache = False
    host = FxHost.from_captured(capture(model, {"input_ids": ids[:, :70].contiguous()}))
    onnx = OnnxHost.from_model(host.to_onnx())
    wanted = model_with_mask(model, ids, 4, 8)
    for each, lowering in ((host, "local-sdpa"), (onnx, "local-attention")):
        made, ((before, after),) = rewritten(each, "sinks 4 window 8", lowering)
        assert (
            "causal" in before and after == before.replace("causal", "causal & (window(8) | global(4))", 1)
        ) or "document" in after
        torch.testing.assert_close(made.runner()({"input_ids": ids})[0], wanted, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(wanted, host.runner()({"input_ids": ids})[0], atol=1e-3)


def test_recall_fails_where_the_pair_is_left_out():
    """Trained to recall pairs from anywhere: a window that holds all of them loses nothing, a narrow one what lies outside."""
    model, batch = trained_models.recall_model(), recall_batch(4, 16, 200, seed=3)
    model.config.use_cache = False
    host = FxHost.from_captured(capture(model, {"input_ids": batch.tokens}))
    accuracies = {}
    for window in (256, 8):
        made, _ = rewritten(host, f"sinks 4 window {window}", "sdpa", windows=(256, 8))
        logits = made.runner()({"input_ids": batch.tokens})[0]
        torch.testing.assert_close(logits, model_with_mask(model, batch.tokens, 4, window), atol=1e-3, rtol=1e-3)
        accuracies[window] = float(batch.accuracy(logits).mean())
    assert accuracies[256] > 0.98
    assert accuracies[8] < 0.3


def test_without_a_causal_mask_it_looks_ahead_as_well():
    host = FxHost.from_captured(capture(SelfAttention().eval(), (torch.randn(2, 5, 64),)))
    (group,) = groups(host)
    candidates = SinksWindow().propose(group, evidence(lambda first, window: 1 / (window + first)))
    assert [c.kind for c in candidates[:3]] == ["sinks 16 window 1024", "sinks 4 window 1024", "sinks 16 window 512"]
    (site,) = SinksWindow().apply(candidates[-1], group).sites
    assert str(site.spec.mask) == "window(64) & lookahead(64) | global(4)"
    assert site.steps == ("sinks-window",)


def test_calibration_orders_the_candidates_by_the_weight_that_they_leave_out():
    host = FxHost.from_captured(capture(SelfAttention().eval(), (torch.randn(2, 5, 64),)))
    (group,) = groups(host)
    dropped = {(4, 64): 0.1, (4, 128): 0.3, (16, 64): 0.02, (16, 128): 0.01}

    found = SinksWindow(windows=(64, 128)).propose(group, evidence(lambda first, window: dropped[first, window]))
    assert [(c.options["sinks"], c.options["window"]) for c in found] == [(16, 128), (16, 64), (4, 64), (4, 128)]
    assert [c.options["dropped"] for c in found] == pytest.approx([0.01, 0.02, 0.1, 0.3], rel=1e-5)
    assert found[2].options["bound"] == pytest.approx(2 * 0.15 * 4.0)
    assert (
        found[2].description
        == "4 sinks and a window of 64: leaves out 0.1 of the weight, and so changes an output by at most 1.2"
    )


def test_refusals():
    mistral = hf_models.build("mistral", "sdpa", layers=1)
    ids = torch.randint(0, hf_models.VOCABULARY, (2, 12))
    host = FxHost.from_captured(capture(mistral, {"input_ids": ids, "use_cache": False}))
    refused = SinksWindow().propose(groups(host)[0], evidence())
    assert isinstance(refused, Refusal) and "has a window already" in refused.reason
    host = FxHost.from_captured(capture(SelfAttention().eval(), (torch.randn(2, 5, 64),), dynamic_shapes={"x": None}))
    refused = SinksWindow().propose(groups(host)[0], None)
    assert isinstance(refused, Refusal) and refused.reason == "the smallest window covers all 5 keys"
    host = FxHost.from_captured(capture(SelfAttention().eval(), (torch.randn(2, 5, 64),)))
    refused = SinksWindow().propose(groups(host)[0], None)
    assert isinstance(refused, Refusal) and "weighed on calibration data, and there are none" in refused.reason
    refused = SinksWindow().propose(groups(host)[0], evidence(lambda first, window: 0.0))
    assert isinstance(refused, Refusal) and "no calibration sequence reaches beyond a window of 64" in refused.reason
    (only,) = SinksWindow(sinks=(4,)).propose(groups(host)[0], evidence(lambda first, window: float(window < 128) / 9))
    assert only.kind == "sinks 4 window 64"
