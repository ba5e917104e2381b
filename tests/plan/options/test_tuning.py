"""Tuning: asked for by --tune or effort high with data, seeded, and refused with a reason everywhere else."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hosts.onnx import small_models
from onnx import helper

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.asked import Asked
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Refusal
from attnopt.passes import Candidate, DynamicInt8, Group
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import classes_of
from attnopt.plan.options.tuning import Tuning
from attnopt.plan.search.effort import EFFORTS, Spent

RANK = 4


@dataclass(frozen=True)
class Thin:
    """Each layer by two thin ones, y = (x A) B, fitted to real inputs by gradient steps from a random start."""

    name: str = "thin"
    exact: bool = False
    per: str = "linear"
    steps: int = 500
    broken: bool = False

    def propose(self, group, evidence):
        return [Candidate(self.name, False, "two thin layers", nodes=group.linears, kind=f"rank {RANK}", changes=("weights",),
                          needs="tuning")]  # fmt: skip

    def tune(self, candidate, group, evidence):
        if self.broken:
            raise RuntimeError("diverged")
        (node,) = group.linears
        held = [tensors for _, tensors in evidence.hold([node.inputs[0], node.output])]
        x, y = (torch.cat([pair[i].flatten(0, -2) for pair in held]) for i in (0, 1))
        a, b = torch.randn(x.shape[1], RANK, requires_grad=True), torch.randn(RANK, y.shape[1], requires_grad=True)
        optimizer = torch.optim.Adam([a, b], 0.05)
        for _ in range(self.steps):
            optimizer.zero_grad()
            loss = (x @ a @ b - y).square().mean()
            loss.backward()
            optimizer.step()
        found = {"a": a.tolist(), "b": b.tolist(), "error": float(loss.detach() / y.square().mean())}
        return replace(candidate, options=found)

    def apply(self, candidate, group):
        (node,) = [n for n in group.host.graph.of("matmul") if n.name == candidate.nodes[0].name]
        product = torch.tensor(candidate.options["a"]) @ torch.tensor(candidate.options["b"])
        group.host.set_constant(node.inputs[1], product)
        return group


@pytest.fixture(scope="module")
def host():
    """y = x W of rank 4."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(16, RANK, generator=random) @ torch.randn(RANK, 16, generator=random) / 8
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")]
    return OnnxHost.from_model(small_models.model(nodes, [small_models.value("x", ["n", 16])], ["y"], {"w": weight.numpy()}))


@pytest.fixture(scope="module")
def evidence(host):
    batches = [{"x": torch.randn(8, 16, generator=torch.Generator().manual_seed(i))} for i in range(4)]
    return Evidence(host, Calibration.of(host.graph, batches))


def offered(host, evidence, effort="high", data=True, seed=0, **options):
    (each,) = classes_of(Grouping(host), (Thin(**options),), evidence, Tuning(Spent(EFFORTS[effort]), data, seed))
    return each


def test_what_a_few_steps_find_is_in_the_options_and_computes(host, evidence):
    each = offered(host, evidence)
    (move,) = each.options[1].moves
    assert each.refusals == () and move.candidate.options["error"] < 0.01
    made = host.copy()
    move.rewrite.apply(move.candidate, Grouping(made).of("linear")[0])
    made.finish()
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(9))
    (before,), (after,) = (h.runner()({"x": x}) for h in (host, made))
    assert 0 < float((after - before).norm() / before.norm()) < 0.1


def test_equal_seeds_find_equal_numbers(host, evidence):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, again, other = (offered(host, evidence, seed=s).options[1].moves[0].candidate.options for s in (3, 3, 4))
    assert first == again and first["a"] != other["a"]
    assert torch.equal(torch.random.get_rng_state(), state)  # the user's own random numbers go on as they would


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"effort": "low"}, "'rank 4' needs tuning: --tune"),
        ({"effort": "medium"}, "'rank 4' needs tuning: --tune"),
        ({"data": False}, "'rank 4' needs tuning, and there are no calibration data"),
        ({"broken": True}, "'rank 4' needs tuning, which failed: diverged"),
    ],
)
def test_without_tuning_it_is_not_offered_and_says_why(host, evidence, changes, why):
    each = offered(host, evidence, **changes)
    assert len(each.options) == 1
    ((name, refusal),) = each.refusals
    assert (name, refusal.reason) == ("thin", why)


def test_a_user_may_ask_for_tuning_at_any_effort():
    assert not Asked(target="cpu").checked().effort.tunes and Asked(target="cpu", tune=True).checked().effort.tunes


def test_what_needs_no_tuning_is_as_it_was(host, evidence):
    tuning, (group,) = Tuning(Spent(EFFORTS["low"]), True), Grouping(host).of("linear")
    candidate = DynamicInt8(smallest=8).propose(group, None)[0]
    assert tuning.of(DynamicInt8(), group, candidate, evidence) is candidate


def test_time_that_is_up_and_a_pass_that_cannot(host, evidence):
    group = Group(host, name="layer")
    candidate = Candidate("int8", False, "", kind="fine", needs="tuning")
    late = Tuning(Spent(replace(EFFORTS["high"], seconds=-1.0)), True)
    refused = late.of(DynamicInt8(), group, candidate, evidence)
    assert isinstance(refused, Refusal) and refused.reason == "'fine' needs tuning, and time is up"
    with pytest.raises(TypeError, match="DynamicInt8 proposes what needs tuning"):
        Tuning(Spent(EFFORTS["high"]), True).of(DynamicInt8(), group, candidate, evidence)
