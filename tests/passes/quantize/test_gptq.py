"""gptq: it needs data, loses less than rounding to the nearest on inputs that are correlated, and says where its codes are."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from linear_models import Layers, X, groups, opened

from attnopt.errors import PlanError
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Refusal
from attnopt.passes import Gptq, RoundWeights
from attnopt.passes.weight_rounding import Wish
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import Move
from attnopt.plan.replay import moves_from, step_of, transferred
from attnopt.report.plan import Plan

LOW = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(200, 6, generator=torch.Generator().manual_seed(2)) @ LOW


@dataclass(frozen=True)
class Seen:
    """Evidence of what the layers of a host read on these inputs."""

    host: object
    inputs: dict

    samples: int = len(ROWS)

    def sees(self, node):
        return True

    def second_moment(self, node):
        (x,) = self.host.tap([node.inputs[0]], self.inputs)
        return x.double().T @ x.double() / len(x)


def seen(host):
    return Seen(host, {next(iter(host.example_inputs())): ROWS})


def applied(host, rewrite, evidence):
    copy = host.copy()
    for mine, theirs in zip(groups(host), groups(copy), strict=True):
        candidate = rewrite.propose(mine, evidence)[0]
        rewrite.apply(with_arrays(rewrite, candidate, mine, evidence), replace(theirs, host=copy))
    copy.finish()
    return copy


def with_arrays(rewrite, candidate, group, evidence):
    return replace(candidate, arrays=rewrite.arrays(candidate, group, evidence)) if isinstance(rewrite, Gptq) else candidate


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("bits", [4, 2])
def test_it_loses_less_than_rounding_to_the_nearest(kind, bits):
    host = opened(kind)
    (name,) = host.example_inputs()
    wanted = host.runner()({name: ROWS})[0]
    wishes = (Wish(bits, 32),)
    losses = [
        float((applied(host, rewrite, seen(host)).runner()({name: ROWS})[0] - wanted).norm())
        for rewrite in (Gptq(wishes=wishes), RoundWeights(wishes=wishes))
    ]
    assert 0 < losses[0] < 0.8 * losses[1]


def test_without_data_it_refuses():
    refused = Gptq().propose(groups(opened("torch"))[0], None)
    assert isinstance(refused, Refusal) and refused.reason == "GPTQ needs calibration data"


def test_codes_travel_with_the_plan_but_not_in_its_file():
    host = opened("torch")
    (group, *_) = groups(host)
    move = Move(Gptq(), group, with_arrays(Gptq(), Gptq().propose(group, seen(host))[0], group, seen(host)))
    step = step_of(move)
    (again,) = moves_from([step], host)
    assert again.candidate.arrays == move.candidate.arrays
    copy = host.copy()
    Gptq().apply(again.candidate, replace(groups(copy)[0], host=copy))
    other = OnnxHost.from_model(FxHost.from_captured(capture(Layers().eval(), (X,))).to_onnx())
    (there,) = transferred([step], host, other)
    assert there.nodes[0] != step.nodes[0]
    assert there.arrays.keys() == there.options["formats"].keys() == there.storage.keys() == {there.nodes[0]}
    (moved,) = moves_from([there], other)
    copy = other.copy()
    Gptq().apply(moved.candidate, replace(next(g for g in Grouping(copy).of("linear") if g.name == there.group), host=copy))
    copy.finish()
    assert "MatMulNBits" in {n.op_type for n in copy.model.graph}
    record = json.loads(json.dumps(Plan("torch", "cpu", "torch", steps=(step,)).to_json()))
    (bare,) = moves_from(Plan.from_json(record).steps, host)
    with pytest.raises(PlanError, match="does not hold the codes that 'gptq' found"):
        Gptq().apply(bare.candidate, replace(groups(host.copy())[0], host=host.copy()))
