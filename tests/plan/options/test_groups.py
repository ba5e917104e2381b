"""What must agree stands in one group: layers that read one value or hold one weight, blocks and tables that are shared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.patterns import recognise
from attnopt.plan.options.groups import Grouping, united


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x, table):
        h = self.norm(x)
        q, k, v = (layer(h).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.mT * 0.3 + table[:, : x.shape[1], : x.shape[1]]
        return x + self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Three blocks, the last with the weights of the first; all add one stored table to their scores."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.table = nn.Parameter(torch.randn(4, 64, 64))

    def forward(self, x):
        for block in (*self.blocks, self.blocks[0]):
            x = block(x, self.table)
        return x


@pytest.fixture(scope="module")
def grouping():
    host = FxHost.from_captured(capture(Stack().eval(), (torch.randn(2, 9, 32),)))
    return Grouping(host, recognise(host.graph).sites)


def test_every_kind_of_group(grouping):
    first, second, third = grouping.sites
    assert [g.sites for g in grouping.of("site")] == [(first,), (second,), (third,)]
    assert [g.sites for g in grouping.of("block")] == [(first, third), (second,)]
    assert [g.sites for g in grouping.of("table")] == [(first, second, third)]
    (whole,) = grouping.of("model")
    assert (whole.sites, len(whole.linears)) == (grouping.sites, 12)
    for per in ("site", "linear", "block", "table", "model"):
        assert len({g.name for g in grouping.of(per)}) == len(grouping.of(per))


def test_layers_of_one_input_or_one_weight(grouping):
    """q, k, v of the shared block six together, its o twice; of the other block three and one."""
    groups = grouping.of("linear")
    assert [len(g.linears) for g in groups] == [6, 2, 3, 1]
    assert [g.norm is not None for g in groups] == [False, False, True, False]  # two norms feed the six
    assert [len(g.linears) for g in grouping.of("block")] == [8, 4]


def test_united():
    keys = {"a": [1], "b": [2], "c": [3], "d": [1, 3], "e": [9]}
    assert united("abcde", keys.__getitem__) == [["a", "c", "d"], ["b"], ["e"]]
