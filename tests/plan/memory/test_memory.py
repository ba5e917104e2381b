"""What plans hold: weights, each once, and caches of the longest load; only what is freed counts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from cached_step import Step, example
from torch import nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.passes import Candidate, Int8Cache
from attnopt.plan.memory.memory import Memory
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import Move

LINEARS = 32 * (32 + 16 + 16 + 32)  # numbers of Step


def memory(host, *loads) -> Memory:
    grouping = Grouping(host)
    return Memory(host.graph, tuple(zip(grouping.sites, grouping.blocks, strict=True)), loads)


@dataclass(frozen=True)
class Told:
    """A pass that is only priced."""

    name: str = "told"
    exact: bool = False
    per: str = "model"


def move(host, **said) -> Move:
    return Move(Told(), Grouping(host).whole()[0], Candidate("told", False, "told", **said))


@pytest.fixture(scope="module")
def step():
    return FxHost.from_captured(capture(Step().eval(), example()))


def test_a_cache_of_the_longest_load(step):
    sizes = step.graph.sizes(step.example_inputs())
    past = next(name for name, size in sizes.items() if size == 5)
    held = memory(step, sizes, sizes | {past: 50}, sizes | {past: 7})
    assert held.after().weights == 4 * LINEARS
    assert held.after().cache == 2 * 51 * (2 * 2 * 8 * 4)  # sequences, positions; keys and values, heads, width, float32


def test_int8_and_what_is_gone(step):
    held = memory(step, step.graph.sizes(step.example_inputs()))
    candidates = {c.kind: c for c in Int8Cache().propose(Grouping(step).whole()[0], None)}
    packed = {kind: Move(Int8Cache(), Grouping(step).whole()[0], c) for kind, c in candidates.items()}
    rows = 2 * 6 * 2  # sequences, positions, heads
    assert held.saved([packed["int8"]]) == rows * 2 * (32 - 16)
    assert held.saved([packed["int8 values"]]) == rows * (32 - 16)
    (site,) = Grouping(step).sites
    gone = move(step, cached={site.name: ""})
    assert held.after([gone]).cache == held.after([packed["int8"], gone]).cache == held.after([gone, packed["int8"]]).cache == 0


def test_a_mask_frees_nothing(step):
    assert memory(step, {}).saved([move(step, changes=("mask",))]) == 0


class Tied(nn.Module):
    """Two layers that hold one weight."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(64, 64, bias=False)
        self.other = nn.Linear(64, 64, bias=False)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(torch.relu(self.one(x)))


def test_a_weight_is_freed_when_nothing_reads_it_any_more():
    host = FxHost.from_captured(capture(Tied().eval(), (torch.randn(2, 64),)))
    held, (one, other) = memory(host, {}), host.graph.of("linear")
    assert held.after().weights == 4 * 64 * 64
    both = move(host, storage={one.name: "int8", other.name: "int8"})
    assert held.saved([both]) == 3 * 64 * 64
    assert held.saved([move(host, storage={one.name: "int8"})]) == -64 * 64  # the other still reads float32
    assert held.saved([move(host, removes=(one,))]) == 0
    assert held.saved([move(host, removes=(one,)), move(host, storage={other.name: "int8"})]) == 3 * 64 * 64
    assert held.saved([replace(both), move(host, removes=(one, other))]) == 4 * 64 * 64
