"""From seconds to what is told: rates, ratios to peers, shares of the ceilings."""

from __future__ import annotations

from collections.abc import Sequence

from gpu.case import Case
from gpu.ceilings import Ceilings
from gpu.measure import Row
from gpu.ours import OURS

UNITS = {"prefill": ("TFLOP/s", 1e12), "decode": ("GB/s", 1e9)}


def rate(row: Row, name: str) -> float | None:
    """Of a contender, in the unit of the row's kind."""
    return row.work / row.seconds[name] / UNITS[row.case.kind][1] if name in row.seconds else None


def on_bf16(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row of the same sizes that is bf16 throughout."""
    return next((r for r in rows if whole(r.case) and sizes(r.case) == sizes(row.case)), None)


def whole(case: Case) -> bool:
    """Whether nothing in it is narrower than bf16."""
    return case.cache == "bf16" and not case.rounded


def sizes(case: Case) -> tuple[object, ...]:
    return case.kind, case.mask, case.width, case.q_len, case.kv_len, case.batch, case.heads, case.key_heads


def peers(row: Row, rows: Sequence[Row]) -> dict[str, float]:
    """Seconds of the contenders that are not ours. What no library can compute is compared with theirs in bf16."""
    twin = row if whole(row.case) else on_bf16(row, rows)
    suffix = "" if twin is row else " on bf16"
    return {} if twin is None else {f"{name}{suffix}": s for name, s in twin.seconds.items() if not name.startswith(OURS)}


def ratio(row: Row, rows: Sequence[Row], *names: str) -> float | None:
    """How many times as fast as the best peer, or as the best of those that are named."""
    others = {name: s for name, s in peers(row, rows).items() if not names or name in names}
    return min(others.values()) / row.seconds[OURS] if others and OURS in row.seconds else None


def share(row: Row, top: Ceilings | None) -> float | None:
    """Of the measured product (prefill) or copy (decode)."""
    found = None if OURS not in row.seconds else row.work / row.seconds[OURS]
    if found is None or top is None:
        return None
    return found / (top.product if row.case.kind == "prefill" else top.copy)
