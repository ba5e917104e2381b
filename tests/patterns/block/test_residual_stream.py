"""The residual stream of real model types, whole, in both hosts; and what makes it something that no matrix passes through."""

from __future__ import annotations

import hf_models
import onnx_exports
import pytest
import torch
from torch import nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Refusal
from attnopt.plan.options.groups import Grouping


def opened(family, kind):
    if kind == "onnx":
        return OnnxHost.from_model(onnx_exports.export(family, "eager", "dynamo"))
    return FxHost.from_captured(capture(hf_models.build(family), hf_models.inputs(family)))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_everything_that_touches_it_is_listed(family, kind):
    stream = Grouping(opened(family, kind)).stream
    assert stream.width == 32
    assert [t.value.shape for t in stream.tables] == [(99, 32)]
    assert len(stream.writers) == 4 and all(w.bias is None for w in stream.writers)
    assert sorted(len(r.layers) for r in stream.readers) == [1, 2, 2, 3, 3]
    assert {r.norm.kind for r in stream.readers} == {"rms"}


def test_norms_with_means_are_listed_and_let_no_rotation_through():
    stream = Grouping(opened("gpt2", "torch")).stream
    assert {r.norm.kind for r in stream.readers} == {"layer"} and len(stream.writers) == 4
    assert "a layer norm reads the residual stream" in stream.refuses_rotation().reason


def test_a_norm_after_the_addition_makes_the_stream_anew():
    refused = Grouping(opened("bert", "torch")).stream
    assert isinstance(refused, Refusal)
    assert "layer" in refused.reason


class Returned(nn.Module):
    """A llama that returns its logits, and by `what` something of its stream too."""

    def __init__(self, what):
        super().__init__()
        self.model, self.what = hf_models.build("llama"), what

    def forward(self, input_ids, attention_mask):
        made = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, output_hidden_states=True)
        if self.what == "sum":
            return made.logits, made.hidden_states[1]
        if self.what == "norm":
            return made.logits, made.hidden_states[-1]
        return made.logits, torch.tanh(made.hidden_states[1])


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("sum", "the model returns values of the residual stream"),
        ("norm", "the model returns a norm of the residual stream"),
        ("tanh", "'tanh' reads the residual stream beside the norms"),
    ],
)
def test_what_leaves_it_is_named(what, reason):
    inputs = {n: x for n, x in hf_models.inputs("llama").items() if isinstance(x, torch.Tensor)}
    refused = Grouping(FxHost.from_captured(capture(Returned(what).eval(), inputs))).stream
    assert isinstance(refused, Refusal)
    assert refused.reason == reason
