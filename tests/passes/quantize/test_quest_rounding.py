"""quest-rounding: the mixing cancels, one mixing serves the layers that read one value, and narrow rows are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_models import Normed, X, groups, hosts_of, opened

from attnopt.passes import QuestRounding, RoundWeights
from attnopt.passes.weight_rounding import Wish


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize(("bits", "most"), [(8, 0.05), (4, 0.3)])
def test_the_mixing_cancels(kind, bits, most):
    host = opened(kind)
    rewrite = QuestRounding(wishes=(Wish(bits, 0),))
    (name,) = host.example_inputs()
    wanted = host.runner()({name: X})[0]
    copy = host.copy()
    for mine, theirs in zip(groups(host), groups(copy), strict=True):
        (candidate,) = rewrite.propose(mine, None)
        assert (candidate.kind, candidate.needs) == (f"int{bits} row", "nothing")
        rewrite.apply(candidate, replace(theirs, host=copy))
    copy.finish()
    assert 1e-5 < float((copy.runner()({name: X})[0] - wanted).norm() / wanted.norm()) < most


def test_layers_that_read_one_value_share_its_mixing():
    x = torch.randn(4, 10, 64)
    for host in hosts_of(Normed("rms", False).eval(), x):
        (group,) = groups(host)
        for rewrite, count in ((QuestRounding(), 1), (RoundWeights(wishes=(Wish(4, 0),)), 0)):
            copy = host.copy()
            (candidate,) = rewrite.propose(group, None)
            rewrite.apply(candidate, replace(groups(copy)[0], host=copy))
            copy.finish()
            mixed = [n for n in copy.graph.of("matmul") if n.inputs[1] is not None and n.inputs[1].shape == (64, 64)]
            assert len(mixed) == count


def test_rows_that_nothing_can_mix_are_refused():
    refused = QuestRounding(block=8).propose(groups(opened("torch"))[0], None)
    assert refused.reason == "no power of two from 16 to 8 divides rows of 64 inputs; 64 does"
    assert QuestRounding().refusal([200], "mlp").reason.endswith("divides rows of 200 inputs; 8 does, and spreads too little")
    said = "the layers have rows of 96, 64 inputs, which are mixed apart; blocks of 32 divide all"
    assert QuestRounding().refusal([96, 64], "mlp").reason == said
