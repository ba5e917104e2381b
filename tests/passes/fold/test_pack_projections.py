"""One product instead of three: equal, read again as packed, on one stored matrix where a layer stands twice."""

from __future__ import annotations

import pytest
import torch
from folded_models import IDS, Language, folded, host, refusals, require_equal
from torch import nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.passes import PackProjections
from attnopt.plan.options.groups import Grouping


@pytest.mark.parametrize(
    ("kind", "options"),
    [("torch", {}), ("torch", {"biased": False, "key_heads": 1}), ("onnx", {})],
)
def test_outputs_stay_and_the_block_is_packed(kind, options):
    given = host(kind, **options)
    made = folded(PackProjections(), given)
    require_equal(made, given)
    assert all(b.packed for b in Grouping(made).blocks)
    products = [sum(n.op in ("linear", "matmul") for n in h.graph.nodes) for h in (given, made)]
    assert products[0] - products[1] == 2


def test_a_layer_that_stands_twice_keeps_one_matrix():
    given = host(shared=True)
    made = folded(PackProjections(), given)
    require_equal(made, given)
    one, two = Grouping(made).blocks
    assert one.q.weight is two.q.weight and one.q.weight.shape == (72, 24)


def test_what_is_packed_already_is_left():
    made = folded(PackProjections(), host())
    assert refusals(PackProjections(), made) == ["queries, keys and values are made by one product already"]


class Coded(nn.Module):
    """A layer whose weight is int8 codes, made whole at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-127, 128, (24, 24), dtype=torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) * 0.01)


def test_quantised_projections_are_refused():
    model = Language().eval()
    model.layer.k = Coded()
    (reason,) = refusals(PackProjections(), FxHost.from_captured(capture(model, {"ids": IDS})))
    assert reason == "projection of keys not found: its weight is made by 'mul', not constant"
