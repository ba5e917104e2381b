"""dynamic-int8: which layers, in which order it gives them up, and how near the result is, in both hosts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hosts.onnx import small_models
from onnx import helper
from torch import nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Refusal
from attnopt.passes import DynamicInt8, Group

WIDTHS = [64, 96, 64, 128, 64]
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


def weights():
    generator = np.random.default_rng(0)
    return [generator.standard_normal((a, b)).astype(np.float32) / 8 for a, b in zip(WIDTHS, WIDTHS[1:], strict=False)]


class Layers(nn.Module):
    """Four linear layers, then a product of two activations, a narrow layer, and a weight of rank three: those cannot be int8."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(WIDTHS, WIDTHS[1:], strict=False))
        for layer, weight in zip(self.layers, weights(), strict=True):
            layer.weight.data, layer.bias.data = torch.from_numpy(weight.T.copy()), torch.zeros(len(weight.T))
        self.narrow = nn.Linear(64, 8)
        self.deep = nn.Parameter(torch.randn(1, 8, 8))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return (self.narrow(x @ x.mT @ x)[None] @ self.deep).sum() * 0.0 + x


def onnx_layers() -> OnnxHost:
    nodes, made = [], {f"w{i}": w for i, w in enumerate(weights())}
    for i in range(len(made)):
        nodes.append(helper.make_node("MatMul", ["x" if i == 0 else f"r{i - 1}", f"w{i}"], [f"m{i}"], name=f"layer{i}"))
        nodes.append(helper.make_node("Relu", [f"m{i}"], [f"r{i}" if i < 3 else "y"], name=f"relu{i}"))
    nodes.append(helper.make_node("MatMul", ["y", "turned"], ["squares"], name="squares"))
    nodes.insert(-1, helper.make_node("Transpose", ["y"], ["turned"], name="turned", perm=[1, 0]))
    nodes.append(helper.make_node("MatMul", ["y", "w_narrow"], ["narrow"], name="narrow"))
    made["w_narrow"] = np.ones((64, 8), np.float32)
    inputs = [small_models.value("x", ["n", 64])]
    return OnnxHost.from_model(small_models.model(nodes, inputs, ["y", "squares", "narrow"], made))


def opened(kind):
    return onnx_layers() if kind == "onnx" else FxHost.from_captured(capture(Layers().eval(), (X,)))


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_wide_layers_with_constant_weights(kind):
    host = opened(kind)
    candidates = DynamicInt8().propose(Group(host, ()))
    assert [c.description for c in candidates] == [
        "all linear layers (4) in int8",
        "all linear layers but the last (3) in int8",
        "the middle half of the linear layers (2) in int8",
    ]
    whole, most, middle = (c.nodes for c in candidates)
    assert (most, middle) == (whole[:-1], whole[1:-1])
    assert all(not c.exact and c.pass_name == "dynamic-int8" and c.source for c in candidates)
    assert len(DynamicInt8(smallest=80).layers(host.graph)) == 0
    assert len(DynamicInt8(smallest=8).layers(host.graph)) == 5


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("chosen", [0, 2])
def test_the_result_is_near_and_the_original_stays(kind, chosen):
    host = opened(kind)
    name = next(iter(host.example_inputs()))
    wanted = host.runner()({name: X})[0]
    copy = host.copy()
    candidate = DynamicInt8().propose(Group(host, ()))[chosen]
    result = DynamicInt8().apply(candidate, Group(copy, ())).host
    result.finish()
    got = result.runner()({name: X})[0]
    relative = float((got - wanted).norm() / wanted.norm())
    assert 1e-5 < relative < 0.02
    torch.testing.assert_close(host.runner()({name: X})[0], wanted, atol=0, rtol=0)
    left = {n.name for n in DynamicInt8().layers(result.graph)}
    assert len(left) == 4 - len(candidate.nodes)
    assert left.isdisjoint(n.name for n in candidate.nodes)


def test_models_without_such_layers_are_refused():
    host = OnnxHost.from_model(small_models.spelled_out())
    refused = DynamicInt8().propose(Group(host, ()))
    assert isinstance(refused, Refusal)
    assert refused.reason == "no linear layer with constant weights of at least 64 x 64"


def test_one_layer_is_one_candidate():
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")]
    model = small_models.model(nodes, [small_models.value("x", ["n", 64])], weights={"w": np.ones((64, 64), np.float32)})
    (candidate,) = DynamicInt8().propose(Group(OnnxHost.from_model(model), ()))
    assert candidate.description == "all linear layers (1) in int8"
