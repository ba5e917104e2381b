"""One line of the table of cpu_attention.py: the median seconds of each contender in one setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cpu.contenders import OURS


@dataclass(frozen=True)
class Row:
    """error: of ours, the largest difference. reasons: of contenders that are absent."""

    setting: str
    gflop: float
    seconds: dict[str, float]
    error: float
    reasons: dict[str, str] = field(default_factory=dict)

    def over(self, *names: str) -> float | None:
        """How many times as fast ours is as the best of those, or of all others."""
        others = [s for name, s in self.seconds.items() if (name in names if names else not name.startswith(OURS))]
        return min(others) / self.seconds[OURS] if others and OURS in self.seconds else None


def beside_float32(rows: Sequence[Row]) -> list[Row]:
    """Packed caches beside the peers on a cache of float32 of the same size."""
    plain = {row.setting.replace("float32", "*"): row for row in rows if " float32 " in row.setting}
    made = []
    for row in rows:
        twin = plain.get(row.setting.replace(" int8 ", " * ").replace(" int4 ", " * "))
        if twin is not None and twin is not row:
            others = {f"{name} float32" if name == OURS else name: s for name, s in twin.seconds.items()}
            made.append(replace(row, seconds=others | row.seconds))
        else:
            made.append(row)
    return made
