"""Deformable attention, from torch and from ONNX, is named as what it is; weights times anything else are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.patterns import recognise

QUERIES, POINTS, WIDTH = 5, 6, 8


class Deformable(nn.Module):
    """Each query weighs what lies at a few places of its own in a feature map."""

    def __init__(self, sampled: bool) -> None:
        super().__init__()
        self.weights, self.places = nn.Linear(WIDTH, POINTS), nn.Linear(WIDTH, 2 * POINTS)
        self.sampled = sampled

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        weights = self.weights(x).softmax(-1)
        places = self.places(x).tanh().unflatten(-1, (POINTS, 2))
        if self.sampled:
            values = nn.functional.grid_sample(features, places, align_corners=False)
        else:
            values = places.mean(-1, keepdim=True).permute(0, 3, 1, 2).expand(-1, WIDTH, -1, -1)
        return (weights[:, None] * values).sum(-1)


def graphs(model: nn.Module):
    inputs = {"x": torch.randn(2, QUERIES, WIDTH), "features": torch.randn(2, WIDTH, 4, 4)}
    captured = capture(model, inputs)
    program = torch.onnx.export(model, (), kwargs=inputs, dynamo=True, opset_version=20, verbose=False)
    return {"torch": FxHost.from_captured(captured).graph, "onnx": OnnxHost.from_model(program.model_proto).graph}


@pytest.mark.parametrize("host", ["torch", "onnx"])
def test_sampled_values_are_deformable_attention(host):
    found = recognise(graphs(Deformable(sampled=True).eval())[host])
    (refusal,) = found.refusals
    assert refusal.reason.startswith("deformable attention: the weights multiply values that ")
    assert "grid" in refusal.reason.lower() and not found.sites


def test_other_products_are_not():
    (refusal,) = recognise(graphs(Deformable(sampled=False).eval())["torch"]).refusals
    assert refusal.reason == "the weights enter 'mul': no product with values follows"
