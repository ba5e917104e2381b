"""A looked-up table of relative positions and a constant mask become one stored term; what would grow stays apart."""

from __future__ import annotations

import functools

import pytest
import torch
from folded_models import folded, refusals
from torch import nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.passes import MergeScoreTerms

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))


class Relative(nn.Module):
    """Two heads; what is added to their scores depends on how far keys are from queries, and `more` on the place of a key."""

    def __init__(self, more) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(9, 2))
        self.register_buffer("index", (torch.arange(5)[:, None] - torch.arange(5) + 4).reshape(-1))
        self.register_buffer("more", more)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).split(16, -1))
        scores = q @ k.transpose(-1, -2) * 8**-0.5
        scores = scores + self.table[self.index].view(5, 5, 2).permute(2, 0, 1)[None]
        return self.o(((scores + self.more).softmax(-1) @ v).transpose(1, 2).flatten(2))


@functools.cache
def host(kind, grows=False):
    torch.manual_seed(1)
    more = torch.randn(4, 1, 1, 5)[:2] if grows else torch.randn(2, 5, 5)
    model = Relative(more).eval()
    if kind == "onnx":
        return OnnxHost.from_model(FxHost.from_captured(capture(model, {"x": X}, dynamic_shapes={"x": None})).to_onnx())
    return FxHost.from_captured(capture(model.double(), {"x": X.double()}, dynamic_shapes={"x": None}))


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_both_terms_are_one_that_is_stored(kind):
    given = host(kind)
    made = folded(MergeScoreTerms(), given)
    x = {given.graph.inputs[0].name: X if kind == "onnx" else X.double()}
    torch.testing.assert_close(made.runner()(x)[0], given.runner()(x)[0], atol=1e-5 if kind == "onnx" else 1e-10, rtol=1e-10)
    adds = [[n for n in h.graph.of("add") if n.output.shape == (2, 2, 5, 5)] for h in (given, made)]
    assert [len(found) for found in adds] == [2, 1] and not list(made.graph.of("gather", "index"))


def test_what_would_be_larger_stays_apart():
    given = host("torch", grows=True)
    made = folded(MergeScoreTerms(), given)
    assert sum(n.output.shape == (2, 2, 5, 5) for n in made.graph.of("add")) == 2 and not list(made.graph.of("gather", "index"))
    assert refusals(MergeScoreTerms(most=10), given) == ["stored as added, a term would hold 50 numbers for 50"]
