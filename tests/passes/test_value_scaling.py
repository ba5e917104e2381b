"""Factors of values pass through an attention: no bit of the output changes, whatever the heads share and however they are packed."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attnopt.cost.target import load_target
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Refusal
from attnopt.passes import DynamicInt8
from attnopt.passes.value_scaling import bias_of, rows_of, scale_values, scaled_by_factor, scaled_by_values
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import Move
from attnopt.plan.options.workshop import Workshop
from attnopt.plan.replay import moves_from, step_of, transferred

WIDTH, HEADS, HEAD = 64, 4, 16
X = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(0))
OUTLIERS = (3, 17)  # channels of the values


class Attention(nn.Module):
    """packed: q, k and v are one layer. leaks: values are returned too."""

    def __init__(self, key_heads=2, packed=False, bias=True, leaks=False, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.sizes, self.leaks, self.repeats = (HEADS * HEAD, key_heads * HEAD, key_heads * HEAD), leaks, HEADS // key_heads
        self.parts = nn.ModuleList(nn.Linear(WIDTH, n, bias=bias) for n in ((sum(self.sizes),) if packed else self.sizes))
        self.norm = nn.LayerNorm(HEADS * HEAD) if norm else nn.Identity()
        self.o = nn.Linear(HEADS * HEAD, WIDTH, bias=bias)
        self.parts[-1].weight.data[[-key_heads * HEAD + c for c in OUTLIERS]] *= 60.0

    def forward(self, x):
        made = torch.cat([part(x) for part in self.parts], -1) if len(self.parts) == 1 else [part(x) for part in self.parts]
        q, k, v = made.split(self.sizes, -1) if len(self.parts) == 1 else made
        heads = [t.unflatten(-1, (-1, HEAD)).transpose(1, 2) for t in (q, k, v)]
        q, k, v = heads[0], *(t.repeat_interleave(self.repeats, 1) for t in heads[1:])
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        result = x + self.o(self.norm(mixed.transpose(1, 2).flatten(2)))
        return (result, v) if self.leaks else result


def host_of(dtype=torch.float64, **options):
    return FxHost.from_captured(capture(Attention(**options).to(dtype).eval(), (X.to(dtype),)))


def projected(host):
    """(the group of the output projection, the attention in front of it)."""
    return next((g, b) for g in Grouping(host).of("linear") if (b := g.behind()) is not None)


@pytest.mark.parametrize("options", [{}, {"key_heads": 1}, {"key_heads": 4, "bias": False}, {"packed": True}])
def test_no_bit_changes(options):
    host = host_of(**options)
    inputs = {next(iter(host.example_inputs())): X.double()}
    copy = host.copy()
    group, (site, block) = projected(copy)
    made = scaled_by_values(site, block, copy.graph)
    assert not isinstance(made, Refusal)
    generator = torch.Generator().manual_seed(1)
    by_row = torch.randint(-6, 7, (block.v.size[1],), generator=generator)
    exponents = by_row[made].tolist()
    scale_values(copy, block.v.node, rows_of(exponents, made, block.v.size[1]), bias_of(block.v.node))
    (o,) = group.linears
    copy.set_input(o, o.inputs[1], o.inputs[1].load() * torch.ldexp(torch.ones(len(exponents)), torch.tensor(exponents)).double())
    copy.finish()
    assert torch.equal(copy.runner()(inputs)[0], host.runner()(inputs)[0])
    (before,), (after,) = (
        h.tap([projected(h)[0].linears[0].inputs[0]], inputs) for h in (host, copy)
    )  # what the projection reads is scaled
    assert torch.equal(after, before / torch.ldexp(torch.ones(len(exponents)), torch.tensor(exponents)).double())


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"leaks": True}, "values are read elsewhere"), ({"norm": True}, None)],
)
def test_refusals(options, reason):
    host = host_of(**options)
    found = [b for g in Grouping(host).of("linear") if (b := g.behind()) is not None]
    refused = scaled_by_values(*found[0], host.graph) if found else None
    assert refused is None or isinstance(refused, Refusal)
    assert reason is None or refused.reason == reason


class Gated(nn.Module):
    """A gated layer; `leaks`: its second factor is returned too."""

    def __init__(self, bias, leaks):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=bias) for a, b in ((WIDTH, 96), (WIDTH, 96), (96, WIDTH)))
        self.leaks = leaks

    def forward(self, x):
        up = self.up(x)
        y = x + self.down(nn.functional.silu(self.gate(x)) * up)
        return (y, up) if self.leaks else y


@pytest.mark.parametrize(("bias", "leaks"), [(False, False), (True, False), (True, True)])
def test_a_factor_of_a_product_takes_the_factors(bias, leaks):
    for host in (found := FxHost.from_captured(capture(Gated(bias, leaks).eval(), (X,))), OnnxHost.from_model(found.to_onnx())):
        copy, inputs = host.copy(), {next(iter(host.example_inputs())): X}
        (down,) = next(g.linears for g in Grouping(copy).of("linear") if len(g.linears) == 1)
        layer = scaled_by_factor(down, copy.graph)
        assert isinstance(layer, Refusal) == leaks
        if not leaks:
            exponents = torch.randint(-6, 7, (96,), generator=torch.Generator().manual_seed(1)).tolist()
            scale_values(copy, layer, exponents, bias_of(layer))
            back = torch.ldexp(torch.ones(96), torch.tensor(exponents))
            copy.set_input(down, down.inputs[1], down.inputs[1].load() * (back if down.op == "linear" else back[:, None]))
            copy.finish()
            assert torch.equal(copy.runner()(inputs)[0], host.runner()(inputs)[0])


@dataclass(frozen=True)
class Seen:
    """Evidence of what the layers of a host read on X."""

    host: object

    def linear(self, node):
        (x,) = self.host.tap([node.inputs[0]], {next(iter(self.host.example_inputs())): X})
        rows = x.reshape(-1, x.shape[-1]).double()
        return SimpleNamespace(input=SimpleNamespace(max_abs=rows.abs().amax(0), mean_square=rows.square().mean(0)))


def moves_of(host):
    """(int8 of q, k and v, the projection in int8, the same smoothed)."""
    found = {g.name: DynamicInt8().propose(g, Seen(host)) for g in Grouping(host).of("linear")}
    named = {g.name: g for g in Grouping(host).of("linear")}
    out = next(name for name, g in named.items() if g.behind() is not None)
    values = next(name for name in named if name != out)
    made = [Move(DynamicInt8(), named[values], found[values][0])]
    return [*made, *(Move(DynamicInt8(), named[out], c) for c in found[out])]


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_the_projection_is_smoothed_and_its_values_may_be_int8_too(kind):
    host = host_of(torch.float32)
    if kind == "onnx":
        host = OnnxHost.from_model(host.to_onnx())
    inputs = {next(iter(host.example_inputs())): X}
    shop = Workshop(
        host, {}, load_target("cpu")[0], "torch" if kind == "torch" else "onnxruntime", host.opset if kind == "onnx" else 0, {}
    )
    rest, plain, smooth = moves_of(host)
    assert f"folded into {smooth.candidate.scales[0].name}" in smooth.candidate.description
    (layer,) = smooth.candidate.scales
    assert smooth.candidate.options["values"].keys() == {layer.name}
    wanted = host.runner()(inputs)[0]

    def loss(*moves):
        got = shop.built(moves).runner()(inputs)[0]
        return float((got - wanted).norm() / wanted.norm())

    assert loss(smooth) < loss(plain) / 3
    assert loss(rest, smooth) < loss(rest) + 1.5 * loss(smooth)  # scaled first, then rounded: the same codes
    replayed = moves_from([step_of(smooth)], host)
    assert replayed[0].candidate.scales == smooth.candidate.scales
    assert loss(*replayed) == loss(smooth)


def test_a_step_is_carried_over_to_onnx():
    host = host_of(torch.float32)
    other = OnnxHost.from_model(host.to_onnx())
    (step,) = transferred([step_of(moves_of(host)[2])], host, other)
    (move,) = moves_from([step], other)
    (layer,) = move.candidate.scales
    assert step.options["values"].keys() == {layer.name}


def test_other_passes_that_hold_the_weights_of_values_exclude_it():
    host = host_of(torch.float32)
    _, plain, smooth = moves_of(host)
    (layer,) = smooth.candidate.scales
    theirs = SimpleNamespace(pass_name="gptq", touches=frozenset([layer.name]))
    assert smooth.candidate.disturbs(theirs) and not plain.candidate.disturbs(theirs)
    theirs.pass_name = "dynamic-int8"
    assert not smooth.candidate.disturbs(theirs)
