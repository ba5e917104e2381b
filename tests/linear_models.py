"""Models of a few linear layers, in both hosts, for tests of passes that change weights."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hosts.onnx import small_models
from onnx import helper
from torch import nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.passes import DynamicInt8
from attnopt.plan.options.groups import Grouping

WIDTHS = [64, 96, 64, 128, 64]
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


def weights():
    generator = np.random.default_rng(0)
    return [generator.standard_normal((a, b)).astype(np.float32) / 8 for a, b in itertools.pairwise(WIDTHS)]


class Layers(nn.Module):
    """Four linear layers, then a product of two activations, a narrow layer, and a weight of rank three: those cannot be int8."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS))
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


def groups(host):
    """Those with layers wide enough, in graph order."""
    return [g for g in Grouping(host, ()).of("linear") if any(DynamicInt8().suits(n) for n in g.linears)]


class Normed(nn.Module):
    """Two layers that read one norm, three of whose 64 channels are a hundred times the others; `leaks` also returns the norm."""

    def __init__(self, kind, leaks):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(64) if kind == "layer" else nn.RMSNorm(64, eps=1e-6)
        self.norm.weight.data[[3, 17, 40]] = 100.0
        if kind == "layer":
            self.norm.bias.data = torch.randn(64)
        self.first, self.second, self.leaks = nn.Linear(64, 64), nn.Linear(64, 96), leaks
        for layer in (self.first, self.second):
            layer.weight.data[:, [3, 17, 40]] /= 100.0

    def forward(self, x):
        normed = self.norm(x)
        result = torch.cat([self.first(normed), self.second(normed)], -1)
        return (result, normed) if self.leaks else result


def hosts_of(model, x):
    captured = FxHost.from_captured(capture(model, (x,)))
    yield captured
    yield OnnxHost.from_model(captured.to_onnx())
