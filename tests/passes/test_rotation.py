"""Rotations change every weight and no output: to the last digits in float64, to float32's in both hosts."""

from __future__ import annotations

import hf_models
import onnx_exports
import pytest
import torch

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.passes.rotation import rotated
from attnopt.plan.groups import Grouping


def host_of(family, kind, double=False):
    if kind == "onnx":
        return OnnxHost.from_model(onnx_exports.export(family, "eager", "dynamo"))
    model = varied(hf_models.build(family))
    return FxHost.from_captured(capture(model.double() if double else model, hf_models.inputs(family)))


def varied(model):
    """Gains of norms that are not all one."""
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if "norm" in name and weight.ndim == 1:
            weight.data = 0.5 + torch.rand(weight.shape, generator=generator)
    return model


def outputs(host, family):
    given = {n: x for n, x in hf_models.inputs(family).items() if isinstance(x, torch.Tensor)}
    return host.runner()(host.named_inputs({**hf_models.inputs(family)} if host.kind == "torch" else given))[0]


def turned(host, seed=0, heads=True):
    copy = host.copy()
    (group,) = Grouping(copy).of("model")
    made = rotated(group, seed, heads)
    made.write(copy)
    copy.finish()
    return copy, made


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_are_equal_in_float64(family, seed):
    host = host_of(family, "torch", double=True)
    copy, made = turned(host, seed)
    assert (made.refusals, len(made.matrices), len(made.rows)) == ([], 15, 6)  # five gains and a table
    torch.testing.assert_close(outputs(copy, family), outputs(host, family), rtol=1e-11, atol=1e-12)
    before = {n.name: n.inputs[1].load() for n in host.graph.of("linear")}
    after = {n.name: n.inputs[1].load() for n in copy.graph.of("linear")}
    assert before.keys() == after.keys()
    assert all((before[name] - after[name]).norm() > 0.5 * before[name].norm() for name in before)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize(("family", "count"), [("llama", 15), ("gpt2", 4), ("bert", 4)])
def test_outputs_are_equal_in_both_hosts(family, kind, count):
    """Without a stream that can be rotated values still are: two layers, value and output each."""
    host = host_of(family, kind)
    copy, made = turned(host)
    assert len(made.matrices) == count
    assert bool(made.refusals) == (family != "llama")
    torch.testing.assert_close(outputs(copy, family), outputs(host, family), rtol=1e-4, atol=2e-5)


def test_moments_turn_with_the_inputs():
    """What a layer reads after the rotation has the second moment that is predicted from before."""
    host = host_of("llama", "torch", double=True)
    copy, made = turned(host)
    given = host.named_inputs(hf_models.inputs("llama"))
    twins = {n.name: n for n in copy.graph.of("linear")}
    assert len(made.inputs) == 13  # all but the two that read products of an mlp
    for node in made.inputs:
        (x,), (y,) = host.tap([node.inputs[0]], given), copy.tap([twins[node.name].inputs[0]], given)
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        torch.testing.assert_close(made.moment(node, x.T @ x), y.T @ y, rtol=1e-9, atol=1e-9)


def test_outliers_are_spread():
    host = host_of("llama", "torch")
    node = next(iter(host.graph.of("linear")))
    weight = node.inputs[1].load().clone()
    weight[:, 5] *= 50.0
    host.set_input(node, node.inputs[1], weight)
    host.finish()
    _, made = turned(host)
    after = next(m for n, m in made.matrices.items() if n.name == node.name)
    assert after.abs().max() / after.square().mean().sqrt() < 0.6 * weight.abs().max() / weight.square().mean().sqrt()
