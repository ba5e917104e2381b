"""How much attention each token receives in a layer, and second moments in which tokens count by it.

    c_j = sum over heads and queries of A[h, i, j]       r_j = least + (1 - least) (c_j - min c) / (max c - min c),  over their mean

    X' diag(r) X / rows       of what the linear layers of that layer read, r constant: the plain second moment

Minimum, maximum and mean are of each sequence; padding has no part in them and counts nothing.
Source: "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs" (attention concentration).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnopt.analysis.attention_mass import SCORES
from attnopt.analysis.calibration import Batch
from attnopt.analysis.operands import Held, held, tapped
from attnopt.analysis.padding import Padding
from attnopt.analysis.running import RunningMoment, nested, restore
from attnopt.ir.graph import Graph, Value
from attnopt.ir.row_blocks import attended
from attnopt.ir.site import Site

LEAST = 0.005  # what the token that receives least counts, before the mean is made 1


@dataclass
class ConcentrationMeasure:
    """The weighted second moments of what some linear layers read; widths: by value."""

    key: str
    site: Site
    graph: Graph
    padding: Padding
    widths: Mapping[Value, int]
    least: float = LEAST
    running: dict[str, RunningMoment] = field(default_factory=dict)

    @property
    def reads(self) -> tuple[Value, ...]:
        return tuple(dict.fromkeys((*tapped(self.site), *self.widths)))

    @property
    def size(self) -> int:
        return sum(8 * width**2 for width in self.widths.values())

    def add(self, data: Mapping[Value, Tensor], inputs: Batch) -> None:
        self.begin()
        site = held(self.site, data, self.graph.sizes(inputs))
        real = self.padding.rows(self.site.size("k"), len(site.k), site.k.shape[2], inputs)
        weights = importance(received(self.site, site, self.padding, inputs), real, self.least)
        for value in self.widths:
            rows = data[value]
            x = rows.reshape(-1, rows.shape[-1]).double()
            counts = weights[:, -x.shape[0] // len(weights) :].reshape(-1)
            self.running[value.name].add(x * counts.sqrt()[:, None], rows=int((counts > 0).sum()))

    def begin(self) -> None:
        for value, width in self.widths.items():
            self.running.setdefault(value.name, RunningMoment(width))

    def state(self) -> dict[str, Tensor]:
        self.begin()
        return nested(self.running)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.begin()
        restore(self.running, state)

    def result(self) -> dict[str, Tensor]:
        self.begin()
        return {name: each.value() for name, each in self.running.items()}


def received(site: Site, on: Held, padding: Padding, inputs: Batch) -> Tensor:
    """c [B, K]: the weight that each key receives, summed over heads and over queries that are no padding."""
    real = padding.rows(site.size("q"), len(on.q), on.q.shape[2], inputs)
    whole = torch.ones(len(on.q), on.q.shape[2], dtype=torch.bool) if real is None else real
    found = torch.zeros(len(on.k), on.k.shape[2], dtype=torch.float64)
    q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (on.q, on.k, on.v))
    for block in attended(site.spec, q, k, v, on.operands, sizes=on.sizes, elements=SCORES):
        rows = whole[:, block.first : block.first + block.weights.shape[2]]
        found += (block.weights.double() * rows[:, None, :, None]).sum((1, 2))
    return found


def importance(concentration: Tensor, real: Tensor | None, least: float) -> Tensor:
    """r [B, K] of concentration [B, K]: of mean 1 over the tokens of a sequence that are real, 0 for padding."""
    real = torch.ones_like(concentration, dtype=torch.bool) if real is None else real
    low = concentration.masked_fill(~real, torch.inf).amin(1, keepdim=True)
    high = concentration.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
    spread = torch.where(high > low, high - low, torch.ones_like(high))
    r = torch.where(high > low, least + (1 - least) * (concentration - low) / spread, torch.ones_like(concentration))
    r = r.masked_fill(~real, 0.0)
    return r / (r.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)).clamp(min=torch.finfo(torch.float64).tiny)


def values_of(site: Site, values: Sequence[Value]) -> str:
    """What a measurement depends on, for its key."""
    return f"{site.name} {site.spec} {', '.join(v.name for v in values)}"
