"""A machine with round numbers, all of which its kernels reach: rooflines by hand."""

from __future__ import annotations

from dataclasses import replace

from attnopt.cost.efficiency import Efficiency
from attnopt.cost.target import Target

FULL = Efficiency(products=1.0, scores=1.0, memory=1.0)
FAMILIES = (
    "sdpa", "sdpa-masked", "flex", "triton", "eager", "eager-softmax", "elementwise", "local-sdpa", "local-sdpa-chunks", "linear",
    "linear-int8", "linear-int8-inputs", "plain",
)  # fmt: skip
TOY = Target(
    name="toy", kind="gpu", description="round numbers", source="made up", units=4, bandwidth=1e9, cache=1000, cache_bandwidth=1e10,
    launch=1e-6, peak={"float32": 1e-3, "int8": 4e-3}, efficiencies=dict.fromkeys(FAMILIES, FULL),
)  # fmt: skip
SHAPE = {"b": 1, "h": 2, "g": 1, "q": 256, "k": 256, "d": 64, "e": 64}


def with_shares(**shares: float) -> Target:
    """The toy with other shares, the same for all kernels."""
    return replace(TOY, efficiencies=dict.fromkeys(FAMILIES, replace(FULL, **shares)))
