"""Attention sublayers that go one by one: each is a decision of its own, and the planner takes the one that does nothing."""

from __future__ import annotations

import functools

import hf_models
import pytest
import torch
from block_models import build, inputs

import attnopt
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Refusal
from attnopt.passes import DropAttention
from attnopt.plan.groups import Grouping

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
