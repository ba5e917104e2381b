"""What the kernels are to reach on an H200, read off the rows of one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpu.case import Case
from gpu.ceilings import Ceilings
from gpu.measure import NOT_MEASURED, Row
from gpu.ours import OURS
from gpu.rates import on_bf16, ratio, share

COSINE = 0.999
Value = Callable[[Row, Sequence[Row], Ceilings], float | None]


@dataclass(frozen=True)
class Goal:
    """The median of `value` over the rows whose cases it is `about` is to be `least`."""

    text: str
    least: float
    about: Callable[[Case], bool]
    value: Value


def long_prefill(mask: str) -> Callable[[Case], bool]:
    return lambda case: (case.kind, case.mask, case.width, case.kv_len, case.rounded) == ("prefill", mask, 128, 16384, "")


def rounded_prefill(mask: str) -> Callable[[Case], bool]:
    return lambda case: (case.mask, case.width, case.kv_len, case.rounded) == (mask, 128, 16384, "int8 fp8")


def long_decode(cache: str) -> Callable[[Case], bool]:
    return lambda case: (case.kind, case.cache, case.kv_len) == ("decode", cache, 131072)


def to_flex(row: Row, rows: Sequence[Row], top: Ceilings) -> float | None:
    return ratio(row, rows, "flex")


def to_the_best_library(row: Row, rows: Sequence[Row], top: Ceilings) -> float | None:
    return ratio(row, rows, "cudnn", "flash")


def of_the_copy(row: Row, rows: Sequence[Row], top: Ceilings) -> float | None:
    return share(row, top)


def to_our_bf16(row: Row, rows: Sequence[Row], top: Ceilings) -> float | None:
    twin = on_bf16(row, rows)
    return twin.seconds[OURS] / row.seconds[OURS] if twin and OURS in twin.seconds and OURS in row.seconds else None


def to_the_best_bf16(row: Row, rows: Sequence[Row], top: Ceilings) -> float | None:
    twin = on_bf16(row, rows)
    return min(twin.seconds.values()) / row.seconds[OURS] if twin and twin.seconds and OURS in row.seconds else None


def cosine(row: Row, rows: Sequence[Row], top: Ceilings) -> float | None:
    return row.cosine


GOALS = (
    *(
        Goal(f"{mask} d128 at 16k, times FlexAttention", 1.2, long_prefill(mask), to_flex)
        for mask in ("window", "documents", "softcap", "alibi")
    ),
    Goal("decode of bf16 caches at 128k, share of the copy", 0.85, long_decode("bf16"), of_the_copy),
    Goal("decode of int4 caches at 128k, times that of bf16", 2.5, long_decode("int4"), to_our_bf16),
    *(
        Goal(f"{mask} d128 at 16k, times the best of cuDNN and flash", 0.85, long_prefill(mask), to_the_best_library)
        for mask in ("full", "causal")
    ),
    *(
        Goal(f"{mask} d128 at 16k in int8 and fp8, times the best bf16 kernel", 1.4, rounded_prefill(mask), to_the_best_bf16)
        for mask in ("full", "causal")
    ),
    Goal("causal d128 at 16k in int8 and fp8, cosine to exact products", COSINE, rounded_prefill("causal"), cosine),
)
COLUMNS = ("goal", "at least", "measured", "")


def goal_lines(rows: Sequence[Row], top: Ceilings | None) -> list[list[str]]:
    lines = []
    for goal in GOALS:
        found = [] if top is None else [goal.value(r, rows, top) for r in rows if goal.about(r.case)]
        known = [x for x in found if x is not None]
        if not known:
            lines.append([goal.text, f"{goal.least:g}", NOT_MEASURED, ""])
            continue
        value = statistics.median(known)
        digits = 5 if goal.least == COSINE else 2
        lines.append(
            [
                goal.text,
                f"{goal.least:g}",
                f"{value:.{digits}f}",
                "reached" if value >= goal.least else "not reached",
            ]
        )
    return lines
