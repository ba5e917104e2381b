"""Statistics that grow row by row and never keep the rows: what a long calibration needs instead of its activations.

    for rows in batches: running.add(rows [n, C])     ->     running.value()      as if all rows had come at once

Sums are float64. Mean and variance are merged pairwise (Chan, Golub, LeVeque: "Updating formulae and a pairwise algorithm for
computing sample variances"), so that a large mean costs no digits. `state` is all there is: saved and restored, work goes on from
where it stopped, bit by bit the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnopt.analysis.statistics import ChannelStatistics

State = dict[str, Tensor]


@dataclass
class RunningChannels:
    """Mean, variance, lowest and highest of each of C channels."""

    width: int
    state: State = field(default_factory=dict)

    def __post_init__(self) -> None:
        zeros = torch.zeros(self.width, dtype=torch.float64)
        self.state = {
            "rows": torch.zeros((), dtype=torch.int64),
            "mean": zeros,
            "squares": zeros.clone(),  # of differences from the mean
            "low": torch.full_like(zeros, torch.inf),
            "high": torch.full_like(zeros, -torch.inf),
        }

    def add(self, rows: Tensor) -> None:
        """rows [n, C]."""
        if not len(rows):
            return
        held, x = self.state, rows.to(torch.float64)
        mean = x.mean(0)
        before, new = int(held["rows"]), len(x)
        away = mean - held["mean"]
        held["squares"] += (x - mean).square().sum(0) + away.square() * (before * new / (before + new))
        held["mean"] += away * (new / (before + new))
        held["rows"] += new
        held["low"], held["high"] = torch.minimum(held["low"], x.amin(0)), torch.maximum(held["high"], x.amax(0))

    def value(self) -> ChannelStatistics:
        held = self.state
        rows = int(held["rows"])
        return ChannelStatistics(rows, held["mean"], held["squares"] / max(rows, 1), held["low"], held["high"])


@dataclass
class RunningMoment:
    """X'X / rows of rows X [n, C]: 8 C^2 bytes, the only statistic whose size is not that of its channels."""

    width: int
    state: State = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = {
            "rows": torch.zeros((), dtype=torch.int64),
            "products": torch.zeros(self.width, self.width, dtype=torch.float64),
        }

    def add(self, data: Tensor, rows: int | None = None) -> None:
        """data [n, C]. rows: how many they count, where some are weighted away."""
        x = data.to(torch.float64)
        self.state["products"].addmm_(x.T, x)
        self.state["rows"] += len(x) if rows is None else rows

    def value(self) -> Tensor:
        return self.state["products"] / max(int(self.state["rows"]), 1)


def nested(parts: Mapping[str, RunningChannels | RunningMoment]) -> State:
    """The states of several, under their names."""
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state.items()}


def restore(parts: Mapping[str, RunningChannels | RunningMoment], state: Mapping[str, Tensor]) -> None:
    for name, part in parts.items():
        part.state = {key: state[f"{name}.{key}"] for key in part.state}
