"""What calibration says of one linear layer and of one attention, as values that a pass reads.

    evidence.linear(node).input.max_abs              largest magnitude of each input channel: what smoothing divides by
    evidence.attention(site).kept(first=4, window=64)    share of each head's weight that four sinks and a window of 64 keep

Every number is a mean over the rows that count: a row of padding counts nowhere (see `padding`), nor does a query that sees no key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

BUCKETS = 21  # keys and distances by power of two: 0, 1, 2-3, 4-7, …, 2^19 and beyond
StatisticsT = TypeVar("StatisticsT")


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Of `rows` rows of C channels, each [C] in float64: mean, variance (of the population), lowest and highest value."""

    rows: int
    mean: Tensor
    variance: Tensor
    low: Tensor
    high: Tensor

    @property
    def max_abs(self) -> Tensor:
        """The largest magnitude of each channel, [C]."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def mean_square(self) -> Tensor:
        """The diagonal of the second moment, [C]."""
        return self.variance + self.mean.square()


@dataclass(frozen=True, eq=False)
class LinearStatistics:
    """What a linear layer reads. Its second moment is large and has a call of its own: `Evidence.second_moment`."""

    layer: str
    input: ChannelStatistics


@dataclass(frozen=True, eq=False)
class AttentionStatistics:
    """Where an attention looks, and what its rows of q, k and v are like; heads are query heads.

    rows: queries counted. mass [H, BUCKETS, 2 * BUCKETS]: share of a query's weight by (position of the key, distance); a key k or a
    distance q - k stands in bucket 0, 1, 2-3, 4-7, …; keys ahead of the query stand in the second half by k - q. The shares of a
    query sum to 1; where a normaliser gives negative weights they are shares of magnitudes.
    entropy [H] of the shares, in nats. peak [H]: mean share of the key that has most. total [H]: mean sum of the weights before they
    were made shares, less than 1 where a sink takes some. q, k, v: channels [heads * width] of what enters the products.
    """

    site: str
    rows: int
    mass: Tensor
    entropy: Tensor
    peak: Tensor
    total: Tensor
    q: ChannelStatistics
    k: ChannelStatistics
    v: ChannelStatistics

    def kept(self, first: int = 0, window: int = 0, lookahead: int = 0) -> Tensor:
        """Share of the weight [H] on keys k < first, or 0 <= q - k < window, or 0 < k - q < lookahead.

        The three are rounded down to powers of two: the share is exact for powers of two, and never too high for others.
        """
        seen = torch.zeros(BUCKETS, 2 * BUCKETS, dtype=torch.bool)
        seen[: buckets_below(first)] = True
        seen[:, : buckets_below(window)] = True
        seen[:, BUCKETS + 1 : BUCKETS + buckets_below(lookahead)] = True
        return (self.mass * seen).sum((-2, -1))

    @property
    def by_distance(self) -> Tensor:
        """Share by q - k, [H, BUCKETS]: 0, 1, 2-3, 4-7, …"""
        return self.mass[..., :BUCKETS].sum(1)

    @property
    def by_key(self) -> Tensor:
        """Share by position of the key, [H, BUCKETS]: 0, 1, 2-3, 4-7, …"""
        return self.mass.sum(2)


def bucket(index: Tensor) -> Tensor:
    """0 -> 0, 1 -> 1, 2-3 -> 2, 4-7 -> 3, …: the number of binary digits, at most BUCKETS - 1. Takes whole numbers of at least 0."""
    digits = torch.frexp(index.to(torch.float64))[1].to(torch.int64)
    return digits.clamp(max=BUCKETS - 1)


def buckets_below(count: int) -> int:
    """How many buckets hold only indices below `count`: 0 -> 0, 1 -> 1, 2 -> 2, 3 -> 2, 4 -> 3, …; the last bucket is open."""
    return min(max(count, 0).bit_length(), BUCKETS - 1)


def parts(value: object, name: str = "") -> dict[str, Tensor]:
    """A statistic as named tensors, to be kept in a file; `joined` reads them back."""
    made: dict[str, Tensor] = {}
    for field in fields(value):  # type: ignore[arg-type]
        held = getattr(value, field.name)
        if isinstance(held, ChannelStatistics):
            made |= parts(held, f"{name}{field.name}.")
        elif not isinstance(held, str):
            made[f"{name}{field.name}"] = torch.as_tensor(held)
    return made


def joined(kind: type[StatisticsT], tensors: Mapping[str, Tensor], name: str = "", **given: str) -> StatisticsT:
    """The statistic of this kind that `parts` wrote; its names are `given`, as they are no tensors."""
    made: dict[str, object] = dict(given)
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in given:
            continue
        if f"{name}{field.name}.rows" in tensors:
            made[field.name] = joined(ChannelStatistics, tensors, f"{name}{field.name}.")
        else:
            held = tensors[f"{name}{field.name}"]
            made[field.name] = int(held) if field.name == "rows" else held
    return kind(**made)
