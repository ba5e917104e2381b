"""dynamic-int8: which layers, when their inputs are smoothed, and how near the result is, in both hosts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from hosts.onnx import small_models
from linear_models import Normed, X, groups, hosts_of, opened

from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Refusal
from attnopt.passes import DynamicInt8
from attnopt.plan.options.groups import Grouping


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_wide_layers_with_constant_weights(kind):
    host = opened(kind)
    found = groups(host)
    assert [len(g.linears) for g in found] == [1, 1, 1, 1]
    proposed = [DynamicInt8().propose(g, None) for g in found]
    assert [c.description for (c,) in proposed] == ["the linear layer in int8"] * 4
    assert [c.nodes for (c,) in proposed] == [g.linears for g in found]
    (candidate,) = proposed[0]
    assert (candidate.exact, candidate.pass_name, candidate.kind, candidate.needs) == (False, "dynamic-int8", "int8", "nothing")
    assert (candidate.storage, candidate.changes) == ({candidate.nodes[0].name: "int8"}, ("weights",))
    assert len(DynamicInt8(smallest=80).layers(host.graph)) == 0
    assert len(DynamicInt8(smallest=8).layers(host.graph)) == 5


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("chosen", [(0, 1, 2, 3), (1, 2)])
def test_the_result_is_near_and_the_original_stays(kind, chosen):
    host = opened(kind)
    name = next(iter(host.example_inputs()))
    wanted = host.runner()({name: X})[0]
    copy = host.copy()
    for i in chosen:
        (candidate,) = DynamicInt8().propose(groups(host)[i], None)
        assert DynamicInt8().apply(candidate, replace(groups(host)[i], host=copy)).host is copy
    copy.finish()
    got = copy.runner()({name: X})[0]
    relative = float((got - wanted).norm() / wanted.norm())
    assert 1e-5 < relative < 0.02
    torch.testing.assert_close(host.runner()({name: X})[0], wanted, atol=0, rtol=0)
    assert len(DynamicInt8().layers(copy.graph)) == 4 - len(chosen)


def test_models_without_such_layers_are_refused():
    host = OnnxHost.from_model(small_models.spelled_out())
    (group,) = Grouping(host, ()).of("model")
    refused = DynamicInt8().propose(group, None)
    assert isinstance(refused, Refusal)
    assert refused.reason == "no linear layer with constant weights of at least 64 x 64"


@dataclass(frozen=True)
class Seen:
    """Evidence of what the layers of a host read on these inputs."""

    host: object
    inputs: dict

    def linear(self, node):
        (x,) = self.host.tap([node.inputs[0]], self.inputs)
        rows = x.reshape(-1, x.shape[-1]).double()
        return SimpleNamespace(input=SimpleNamespace(max_abs=rows.abs().amax(0), mean_square=rows.square().mean(0)))

    def attention(self, site):
        return None


@pytest.mark.sampled(2)
@pytest.mark.parametrize("leaks", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_smoothing_takes_outliers_out_of_the_inputs(kind, leaks):
    """Folded into a norm that only the layers read, in front of them otherwise; nothing but the rounding changes."""
    x = torch.randn(4, 10, 64)
    for host in hosts_of(Normed(kind, leaks).eval(), x):
        inputs = dict.fromkeys(host.example_inputs(), x)
        (group,) = groups(host)
        assert len(group.linears) == 2
        plain, smooth = DynamicInt8().propose(group, Seen(host, inputs))
        assert (smooth.kind, smooth.needs, smooth.source, smooth.options["fold"]) == (
            "int8 smoothed",
            "calibration",
            "SmoothQuant",
            not leaks,
        )
        wanted, *normed = host.runner()(inputs)
        errors = []
        for candidate in (plain, smooth):
            copy = host.copy()
            DynamicInt8().apply(candidate, replace(groups(copy)[0], host=copy))
            copy.finish()
            got, *after = copy.runner()(inputs)
            errors.append(float((got - wanted).norm() / wanted.norm()))
            torch.testing.assert_close(after, normed, atol=0, rtol=0)
        assert errors[1] < errors[0] / 4
        torch.testing.assert_close(host.runner()(inputs)[0], wanted, atol=0, rtol=0)


def test_layers_whose_inputs_are_even_are_not_smoothed():
    host = opened("torch")
    (name,) = host.example_inputs()
    (plain,) = DynamicInt8().propose(groups(host)[0], Seen(host, {name: X}))
    assert plain.kind == "int8"
