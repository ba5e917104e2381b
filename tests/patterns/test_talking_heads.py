"""A mix across heads is named where it stands, in every spelling; a mix of anything else is not called so."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.patterns import recognise

HEADS, WIDTH = 4, 8


class Talking(nn.Module):
    """`how`: the spelling of the mix. before, after: whether scores and weights are mixed. masked: a mask after the first mix."""

    SPELLINGS: ClassVar = ("linear", "convolution", "einsum")

    def __init__(self, how: str, before: bool, after: bool, masked: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(HEADS * WIDTH, HEADS * WIDTH) for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(HEADS, HEADS) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(HEADS, HEADS, 1, bias=False) for _ in range(2))
        self.how, self.before, self.after, self.masked = how, before, after, masked

    def mixed(self, x: Tensor, which: int) -> Tensor:
        if self.how == "linear":
            return self.linears[which](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.how == "convolution":
            return self.convolutions[which](x)
        return torch.einsum("hg,bgqk->bhqk", self.linears[which].weight, x)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.mT * 0.25
        if self.before:
            scores = self.mixed(scores, 0)
        if self.masked:
            scores = scores + torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
        p = scores.softmax(-1)
        if self.after:
            p = self.mixed(p, 1)
        return (p @ v).transpose(1, 2).flatten(2)


def refusal(model: nn.Module):
    host = FxHost.from_captured(capture(model.eval(), (torch.randn(2, 6, HEADS * WIDTH),)))
    found = recognise(host.graph)
    assert not found.sites
    (refused,) = found.refusals
    return refused


@pytest.mark.parametrize("how", Talking.SPELLINGS)
@pytest.mark.parametrize(("before", "after", "what"), [(True, False, "scores"), (False, True, "weights"), (True, True, "weights")])
def test_talking_heads_are_named(how, before, after, what):
    refused = refusal(Talking(how, before, after))
    assert refused.reason.startswith(f"the {what} are mixed across heads by '")
    assert "talking heads" in refused.reason
    assert "mix(m)" in refused.remedy


def test_a_mask_after_the_mix_is_walked_through():
    assert refusal(Talking("linear", True, False, masked=True)).reason.startswith("the scores are mixed across heads")


def test_without_a_mix_it_is_plain_attention():
    host = FxHost.from_captured(capture(Talking("linear", False, False).eval(), (torch.randn(2, 6, HEADS * WIDTH),)))
    (site,) = recognise(host.graph).sites
    assert str(site.spec) == "softmax heads(4) width(8) scale(0.25)"


def test_a_linear_layer_over_the_keys_is_no_mix_of_heads():
    class OverKeys(Talking):
        def mixed(self, x: Tensor, which: int) -> Tensor:
            return nn.functional.linear(x, torch.eye(6))

    refused = refusal(OverKeys("linear", False, True))
    assert "talking heads" not in refused.reason
