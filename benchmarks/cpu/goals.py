"""What the kernels are to reach on a CPU, each beside what was measured.

goals(rows, visits)   ->   Goal("full: at least 0.95 of the best peer", 0.95, values by setting), …      reached where all values are
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cpu.contenders import BASELINE, OURS
from cpu.row import Row
from cpu.visits import Visit

WINDOW = "window 512 8192 d64"  # how the setting of a goal starts
WITHIN = 0.2
OF_FLOAT32 = f"{OURS} float32"


@dataclass(frozen=True)
class Goal:
    """least: of each value, by setting. reached: None where nothing was measured."""

    name: str
    least: float
    values: Mapping[str, float]

    @property
    def reached(self) -> bool | None:
        return min(self.values.values()) >= self.least if self.values else None

    def __str__(self) -> str:
        if not self.values:
            return f"{self.name}: not measured"
        worst = min(self.values, key=self.values.__getitem__)
        good = sum(value >= self.least for value in self.values.values())
        middle = statistics.median(self.values.values())
        said = "reached" if self.reached else "not reached"
        many = f"; in {good} of {len(self.values)} settings, median {middle:.2f}, least" if len(self.values) > 1 else ","
        return f"{self.name}: {said}{many} {self.values[worst]:.2f} ({worst})"


def goals(rows: Sequence[Row], visits: Sequence[Visit]) -> list[Goal]:
    """rows: packed caches beside the cache of float32 (`beside_float32`)."""
    decoded = [row for row in rows if row.setting.startswith("decode int8 ")]
    windows = [row for row in rows if row.setting.startswith(WINDOW)]
    follows = {x.name: 1 - abs(x.rate - 1) for x in visits}
    return [
        Goal("full: at least 0.95 of the best peer", 0.95, over(row for row in rows if row.setting.startswith("full "))),
        Goal("causal: at least 1.1 times the best peer", 1.1, over(row for row in rows if row.setting.startswith("causal "))),
        Goal("window 512 of 8,192: at least 1.1 times FlexAttention", 1.1, over(windows, "flex")),
        Goal("window 512 of 8,192: at least 8 times SDPA with the mask", 8.0, over(windows, BASELINE)),
        Goal("one query: at least 1.8 times as fast from int8 as from float32", 1.8, over(decoded, OF_FLOAT32)),
        Goal(f"time follows the visited blocks within {WITHIN:.0%}", 1 - WITHIN, follows),
    ]


def over(rows: Iterable[Row], *names: str) -> dict[str, float]:
    return {row.setting: ratio for row in rows if (ratio := row.over(*names)) is not None}
