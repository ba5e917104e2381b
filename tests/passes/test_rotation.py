"""Rotations change every weight and no output: to the last digits in float64, to float32's in both hosts."""

from __future__ import annotations

import hf_models
import onnx_exports
import pytest
import torch
from torch import nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.passes.rotation import rotated
from attnopt.plan.groups import Grouping

WIDTH, HEADS, KEY_HEADS, HEAD = 24, 3, 1, 8


class Norm(nn.Module):
    """By root mean square, in the type of what it reads; a model that stores its gain less one has `shift`."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.weight, self.shift = nn.Parameter(0.5 + torch.rand(WIDTH)), shift

    def forward(self, x):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normed * (self.weight + self.shift if self.shift else self.weight)


class Layer(nn.Module):
    def __init__(self, shift, biased):
        super().__init__()
        self.first, self.second = Norm(shift), Norm(shift)
        widths = {"q": HEADS, "k": KEY_HEADS, "v": KEY_HEADS}
        self.parts = nn.ModuleDict({name: nn.Linear(WIDTH, n * HEAD, bias=biased) for name, n in widths.items()})
        self.o = nn.Linear(HEADS * HEAD, WIDTH, bias=biased)
        self.up, self.gate, self.down = nn.Linear(WIDTH, 40), nn.Linear(WIDTH, 40, bias=False), nn.Linear(40, WIDTH, bias=biased)

    def forward(self, x):
        normed = self.first(x)
        q, k, v = (self.parts[n](normed).unflatten(-1, (-1, HEAD)).transpose(1, 2) for n in "qkv")
        k, v = (y.repeat_interleave(HEADS // KEY_HEADS, 1) for y in (k, v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        normed = self.second(x)
        return x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


class Model(nn.Module):
    """Tied embeddings, positions from a table that is added, a head."""

    def __init__(self, shift=0.0, biased=False):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(50, WIDTH), nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList(Layer(shift, biased) for _ in range(2))
        self.norm, self.head = Norm(shift), nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids) * 3.0 + self.places(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))


def double(**options):
    return FxHost.from_captured(capture(Model(**options).double().eval(), (IDS,)))


def turned(host, seed=0, heads=True):
    copy = host.copy()
    (group,) = Grouping(copy).of("model")
    made = rotated(group, seed, heads)
    made.write(copy)
    copy.finish()
    return copy, made


@pytest.mark.sampled(3)
@pytest.mark.parametrize("options", [{}, {"shift": 1.0}, {"biased": True}])
@pytest.mark.parametrize("heads", [True, False])
def test_outputs_are_equal_in_float64(options, heads):
    host = double(**options)
    copy, made = turned(host, heads=heads)
    assert (made.refusals, len(made.matrices)) == ([], 15)
    inputs = {next(iter(host.example_inputs())): IDS}
    torch.testing.assert_close(copy.runner()(inputs)[0], host.runner()(inputs)[0], rtol=1e-12, atol=1e-12)
    before = {n.name: n.inputs[1].load() for n in host.graph.of("linear")}
    after = {n.name: n.inputs[1].load() for n in copy.graph.of("linear")}
    assert before.keys() == after.keys()
    assert all((before[name] - after[name]).norm() > 0.3 * before[name].norm() for name in before)


def test_another_seed_is_another_rotation():
    host = double()
    one, again, other = (turned(host, seed)[1].matrices for seed in (0, 0, 1))
    for a, b, c in zip(one.values(), again.values(), other.values(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_moments_turn_with_the_inputs():
    """What a layer reads after the rotation has the second moment that is predicted from before."""
    host = double()
    copy, made = turned(host)
    inputs = {next(iter(host.example_inputs())): IDS}
    before, after = ({n.name: n for n in h.graph.of("linear")} for h in (host, copy))
    assert len(made.inputs) == 13  # all but the two that read the products of an mlp
    for node in made.inputs:
        (x,) = host.tap([before[node.name].inputs[0]], inputs)
        (y,) = copy.tap([after[node.name].inputs[0]], inputs)
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        torch.testing.assert_close(made.moment(node, x.T @ x), y.T @ y, rtol=1e-10, atol=1e-10)


def test_outliers_are_spread():
    host = double()
    node = next(iter(host.graph.of("linear")))
    weight = node.inputs[1].load().clone()
    weight[:, 5] *= 50.0
    host.set_input(node, node.inputs[1], weight)
    host.finish()
    _, made = turned(host)
    after = next(m for n, m in made.matrices.items() if n.name == node.name)
    assert after.abs().max() / after.square().mean().sqrt() < 0.6 * weight.abs().max() / weight.square().mean().sqrt()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize(("family", "count"), [("llama", 15), ("gpt2", 4), ("bert", 4)])
def test_real_model_types_in_both_hosts(family, kind, count):
    """Without a stream that can be rotated values still are: two layers, value and output each."""
    if kind == "onnx":
        host = OnnxHost.from_model(onnx_exports.export(family, "eager", "dynamo"))
        given = host.named_inputs({n: x for n, x in hf_models.inputs(family).items() if isinstance(x, torch.Tensor)})
    else:
        host = FxHost.from_captured(capture(hf_models.build(family), hf_models.inputs(family)))
        given = host.named_inputs(hf_models.inputs(family))
    copy, made = turned(host)
    assert len(made.matrices) == count
    assert bool(made.refusals) == (family != "llama")
    torch.testing.assert_close(copy.runner()(given)[0], host.runner()(given)[0], rtol=1e-4, atol=2e-5)
