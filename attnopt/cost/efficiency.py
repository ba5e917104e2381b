"""How close the kernels of a family come to what the machine could do: shares of its rates, and what a call costs by itself.

    [sdpa]  products = 0.74  scores = 0.12  memory = 0.8  launch = 6.1e-6  ramp = 9.0

Shipped values stand in `efficiencies.toml`, by kind of machine, each with its source; a target may hold its own (`attnopt calibrate`).
Kernels that multiply bytes reach other shares with other instructions: theirs stand by feature too, as `cpu-vnni` and `cpu-amx`, and what
is under `cpu` holds for a machine that widens bytes before it multiplies them (AVX2).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any

PLAIN = "plain"  # the family whose shares stand for one that nobody has measured
BYTES = (  # families whose shares depend on what the processor has for products of bytes
    "linear-int8", "linear-int8-inputs", "ort-linear-int8", "ort-linear-int8-inputs", "ort-linear-4bits", "ort-linear-8bits",
)  # fmt: skip


@dataclass(frozen=True)
class Efficiency:
    """Shares of the target's rates, 0 < share <= 1.

    products: of the peak of matrix products. scores: of the float32 peak, for operations on single numbers. memory: of bandwidth.
    launch: seconds per call or node, above what the target takes for any.
    ramp: rows of a product at which it reaches half of its rate (0: at once).
    overlap: how much of the shorter of computing and moving hides behind the longer: 1 on machines that do both at once.
    """

    products: float = 0.7
    scores: float = 0.2
    memory: float = 0.8
    launch: float = 0.0
    ramp: float = 0.0
    overlap: float = 1.0

    def __post_init__(self) -> None:
        for name in ("products", "scores", "memory"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)!r} is no share: it must be above 0 and at most 1")
        if self.launch < 0 or self.ramp < 0 or not 0 <= self.overlap <= 1:
            raise ValueError(f"launch and ramp cannot be negative, overlap lies between 0 and 1: {self}")


def efficiencies(tables: dict[str, Any]) -> dict[str, Efficiency]:
    """Families by name from tables of TOML; `source` and other text is for readers. Raises ValueError for what is no share."""
    known = {f.name for f in fields(Efficiency)}
    return {
        family: Efficiency(**{name: float(value) for name, value in table.items() if name in known})
        for family, table in tables.items()
        if isinstance(table, dict)
    }


@cache
def shipped(kind: str) -> dict[str, Efficiency]:
    """The families of a kind of machine ("cpu", "gpu", "cpu-vnni") as the package knows them; none of a kind that it does not know."""
    return efficiencies(shipped_tables().get(kind, {}))


@cache
def shipped_tables() -> dict[str, Any]:
    return tomllib.loads((resources.files("attnopt.cost") / "efficiencies.toml").read_text(encoding="utf-8"))
