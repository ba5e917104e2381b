"""A softmax is found however it is written, and what only looks like one is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.patterns import recognise
from attnopt.patterns.normalizer import anchors

SPELLINGS = {
    "operator": lambda s: s.softmax(-1),
    "quotient": lambda s: s.exp() / s.exp().sum(-1, keepdim=True),
    "shifted": lambda s: (e := (s - s.amax(-1, keepdim=True)).exp()) / e.sum(-1, keepdim=True),
    "logarithms": lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(),
    "logarithms apart": lambda s: (s - s.logsumexp(-1).unsqueeze(-1)).exp(),
}
NONE = {
    "over all rows": lambda s: (s - s.logsumexp((-2, -1), keepdim=True)).exp(),
    "of other scores": lambda s: (s - (2 * s).logsumexp(-1, keepdim=True)).exp(),
    "added": lambda s: (s + s.logsumexp(-1, keepdim=True)).exp(),
}


class Model(nn.Module):
    def __init__(self, normalise) -> None:
        super().__init__()
        self.qkv, self.normalise = nn.Linear(16, 48), normalise

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return (self.normalise(q @ k.mT / 8**0.5) @ v).transpose(1, 2).flatten(2)


def graphs(normalise):
    model, given = Model(normalise).eval(), {"x": torch.randn(2, 5, 16)}
    yield FxHost.from_captured(capture(model, given)).graph
    yield OnnxHost.from_model(torch.onnx.export(model, (), kwargs=given, dynamo=True, verbose=False).model_proto).graph


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling):
    for graph in graphs(SPELLINGS[spelling]):
        (site,) = recognise(graph).sites
        assert str(site.spec) == "softmax heads(2) width(8) scale(0.3535534)"


@pytest.mark.parametrize("spelling", NONE)
def test_near_misses(spelling):
    for graph in graphs(NONE[spelling]):
        assert not list(anchors(graph)) and not recognise(graph).sites
