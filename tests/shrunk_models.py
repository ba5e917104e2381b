"""Hosts of tiny models whose heads are changed, and how to change them: made once for all tests."""

from __future__ import annotations

import functools

import hf_models
import torch
from torch import nn

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.plan.options.groups import Grouping

IDS = torch.randint(0, hf_models.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        made = self.model(input_ids=input_ids)
        return made.logits if hasattr(made, "logits") else made.last_hidden_state


@functools.cache
def model(family: str) -> nn.Module:
    """Two layers, four heads of 8 channels; llama has two key heads. Norm gains, biases and heads are far from their initial values."""
    made = hf_models.build(family, "sdpa")
    if hasattr(made.config, "use_cache"):
        made.config.use_cache = False
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator) * (1.0 if parameter.ndim > 1 else 0.5)
    return made


@functools.cache
def host(family: str, kind: str):
    made = FxHost.from_captured(capture(Logits(model(family)).eval(), {"input_ids": IDS}))
    return OnnxHost.from_model(made.to_onnx()) if kind == "onnx" else made


@functools.cache
def evidence(family: str, kind: str) -> Evidence:
    found = host(family, kind)
    return Evidence(found, Calibration.of(found.graph, [{"input_ids": IDS}]), sites=Grouping(found).sites)


def output(of) -> torch.Tensor:
    return of.runner()({"input_ids": IDS})[0]


def rewritten(given, change, blocks=(0, 1)):
    """A copy in which `change(group)` was made to these blocks, one after the other."""
    made = given.copy()
    for at in blocks:
        change(Grouping(made).of("block")[at])
        made.finish()
    return made


def applied(rewrite, found, given, kind: str, blocks=(0, 1)):
    """A copy after the candidate of one kind in these blocks."""
    groups = Grouping(given).of("block")

    def change(group):
        offers = rewrite.propose(next(g for g in groups if g.name == group.name), found)
        rewrite.apply(next(c for c in offers if c.kind == kind), group)

    return rewritten(given, change, blocks)
