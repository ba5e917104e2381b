"""Attention sublayers that go one by one: each is a decision of its own, and the planner takes the one that does nothing."""

from __future__ import annotations

import functools
from dataclasses import replace

import hf_models
import pytest
import torch
from block_models import build, inputs
from decoding_models import named, past_of, step_of

import attnopt
from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.errors import PlanError
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Refusal
from attnopt.passes import DropAttention
from attnopt.plan.options.groups import Grouping

IDS = torch.randint(0, hf_models.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


@functools.cache
def decoder():
    """Layer 1 adds nothing: its output projection is zero."""
    model = hf_models.build("llama", "sdpa", layers=3)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    return model


def offers(host):
    return [(group, DropAttention().propose(group, None)) for group in Grouping(host).of("block")]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_each_block_is_an_offer_and_one_without_effect_changes_nothing(kind):
    host = FxHost.from_captured(capture(decoder(), {"input_ids": IDS}))
    host = OnnxHost.from_model(host.to_onnx()) if kind == "onnx" else host
    found = offers(host)
    removed = [node for _, (c,) in found for node in c.removes]
    assert len(set(removed)) == len(removed)  # what layers share, such as a mask, goes with none of them
    assert [c.options["sites"] for _, (c,) in found] == [[g.sites[0].name] for g, _ in found] and len(found) == 3
    changed = []
    for at, (_, (candidate,)) in enumerate(found):
        made = host.copy()
        DropAttention().apply(candidate, Grouping(made).of("block")[at])
        made.finish()
        assert len(Grouping(made).sites) == 2
        given = {"input_ids": IDS}
        changed.append(float((made.runner()(given)[0] - host.runner()(given)[0]).abs().max()))
    assert changed[1] < 1e-6 and min(changed[0], changed[2]) > 1e-3


def test_the_planner_takes_the_layer_that_does_nothing_and_no_other():
    batches = [{"input_ids": torch.randint(0, hf_models.VOCABULARY, (4, 9))} for _ in range(8)]
    fast = attnopt.optimize(
        decoder(), {"input_ids": IDS}, budget=1e-9, calibration=batches, passes=["drop-attention"], select="model"
    )  # fmt: skip
    assert [step.options["sites"] for step in fast.plan.steps] == [["model.layers.1.self_attn"]]
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=IDS).logits, decoder()(input_ids=IDS).logits, atol=1e-6, rtol=1e-6)


def test_what_cannot_go_is_refused():
    host = FxHost.from_captured(capture(build("bart", "eager"), inputs("bart")))
    refused = {g.sites[0].name: r.reason for g, r in offers(host) if isinstance(r, Refusal)}
    assert "attends to another sequence" in refused["model.decoder.layers.0.encoder_attn"]


def test_the_last_cache_stays_where_it_alone_tells_how_long_the_past_is():
    past = decoder()(IDS, use_cache=True).past_key_values
    host = FxHost.from_captured(capture(decoder(), {"input_ids": IDS[:, :1], "past_key_values": past}))
    for left in (2, 1):
        group = Grouping(host).of("block")[0]
        (candidate,) = DropAttention().propose(group, None)
        assert candidate.cached == {group.sites[0].name: ""}
        DropAttention().apply(candidate, group)
        host.finish()
        assert len(Grouping(host).sites) == left
    (group,) = Grouping(host).of("block")
    refused = DropAttention().propose(group, None)
    assert isinstance(refused, Refusal) and "tells the size" in refused.reason
    with pytest.raises(RuntimeError, match="cannot go: no other input tells the size"):
        DropAttention().apply(candidate.__class__(**{**vars(candidate), "options": {"sites": [group.sites[0].name]}}), group)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_pruned_decoder_goes_on_with_its_cache_token_for_token(kind):
    start = 4
    host = step_of(decoder(), IDS[:, : start + 1], kind)
    made = host.copy()
    group = Grouping(made).of("block")[1]
    (candidate,) = DropAttention().propose(group, None)
    DropAttention().apply(candidate, group)
    made.finish()
    names = [s.name for s in made.input_specs]
    assert len(names) == len(host.input_specs) - 2 and len(made.output_names) == len(host.output_names) - 2
    with torch.no_grad():
        wanted = decoder()(IDS, use_cache=False).logits  # layer 1 adds nothing: so it computes what the pruned model does
    state = made.adapt(named(host, IDS[:, start : start + 1], past_of(decoder(), IDS[:, :start])))
    assert list(state) == names
    run = made.runner()
    for at in range(start, IDS.shape[1]):
        logits, *past = run(state)
        torch.testing.assert_close(logits[:, 0], wanted[:, at], atol=2e-5, rtol=2e-5)
        assert all(x.shape[2] == at + 1 for x in past) and len(past) == 4
        state = dict(zip(names, (IDS[:, at + 1 : at + 2], *past), strict=True))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_the_layer_that_follows_is_fitted_to_make_up_for_what_is_gone(kind):
    """GPT-2's: its MLP has biases, which are added by nodes of their own."""
    model, random = hf_models.build("gpt2", "sdpa"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(4.0 if weight.ndim == 2 and "wte" not in name else 1.0)
    host = FxHost.from_captured(capture(model, {"input_ids": IDS}))
    host = OnnxHost.from_model(host.to_onnx()) if kind == "onnx" else host
    batches = [{"input_ids": torch.randint(0, hf_models.VOCABULARY, (64, 9), generator=random)}]
    group = Grouping(host).of("block")[0]
    found = Evidence(host, Calibration.of(host.graph, batches), sites=Grouping(host).sites)
    plain, twin = DropAttention().propose(group, found)
    assert (twin.kind, twin.needs, twin.arrays) == ("removed, fitted", "tuning", {}) and plain.kind == "removed"
    twin = replace(twin, arrays=DropAttention().arrays(DropAttention().tune(twin, group, found), group, found))
    lost = []
    for candidate in (plain, twin):
        made = host.copy()
        DropAttention().apply(candidate, Grouping(made).of("block")[0])
        made.finish()
        lost.append(float((made.runner()({"input_ids": IDS})[0] - host.runner()({"input_ids": IDS})[0]).norm()))
    assert lost[1] < 0.8 * lost[0]
    with pytest.raises(PlanError, match="was fitted on calibration data"):
        DropAttention().apply(replace(twin, arrays={}), Grouping(host.copy()).of("block")[0])
