"""Rows as text: rates, ratios to the best peer and to FlexAttention, shares of what the GPU can do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import harness

from gpu.ceilings import Ceilings
from gpu.goals import COLUMNS as GOAL_COLUMNS
from gpu.goals import goal_lines
from gpu.measure import NOT_MEASURED, NOT_REACHED, Row
from gpu.ours import OURS
from gpu.rates import UNITS, peers, rate, ratio, share

COLUMNS = ("case", OURS, "best peer", "ratio", "to flex", "share", "all contenders", "difference")
COMMAND = "python benchmarks/gpu_attention.py"


def shown(number: float | None, text: str = "{:.2f}x") -> str:
    return "" if number is None else text.format(number)


def cells(row: Row, rows: Sequence[Row], top: Ceilings | None) -> list[str]:
    if row.state:
        return [row.case.name, row.state, *[NOT_MEASURED if row.state == NOT_MEASURED else ""] * (len(COLUMNS) - 2)]
    unit, per = UNITS[row.case.kind]
    others = peers(row, rows)
    best = min(others, key=others.__getitem__, default=None)
    mine = f"{rate(row, OURS):.0f} {unit}" if OURS in row.seconds else row.reasons.get(OURS, "")
    told = [f"{name} {rate(row, name):.0f}" for name in row.seconds if name != OURS]
    told += [f"{name}: {why}" for name, why in row.reasons.items() if name != OURS]
    size = max((x for x in (row.error, row.apart) if x is not None), default=None)
    return [
        row.case.name,
        mine + (" WRONG" if row.wrong else ""),
        "" if best is None else f"{best} {row.work / others[best] / per:.0f}",
        shown(ratio(row, rows)),
        shown(ratio(row, rows, "flex")),
        shown(share(row, top), "{:.0%}"),
        "; ".join(told),
        shown(size, "{:.0e}") + ("" if row.cosine is None else f", cosine {row.cosine:.5f}"),
    ]


def as_text(rows: Sequence[Row], top: Ceilings | None) -> str:
    """What is printed last: short columns, without the list of contenders."""
    kept = [at for at, name in enumerate(COLUMNS) if name != "all contenders"]
    lines = [
        [cells_[at] for at in kept] for cells_ in ([*COLUMNS], *(cells(r, rows, top) for r in rows if r.state != NOT_REACHED))
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if left := [r.case.name for r in rows if r.state == NOT_REACHED]:
        text.append(f"not reached before the deadline ({len(left)}): {', '.join(left)}")
    return "\n".join(text)


def markdown(rows: Sequence[Row], top: Ceilings | None, notes: Iterable[str]) -> str:
    parts = [
        "# Attention on a GPU\n",
        "\n".join(f"- {note}" for note in notes) + "\n",
        "## Goals, on an H200\n",
        harness.markdown(GOAL_COLUMNS, goal_lines(rows, top)),
        "## All rows\n",
        "Rates count visible pairs only, and for decoding the bytes of keys and values. Ratios are times as fast; the share is of the bf16"
        " product for prefills and of the copy for decoding. Contenders that did not run say why.\n",
        harness.markdown(COLUMNS, [[c.replace("|", "\\|") for c in cells(r, rows, top)] for r in rows]),
    ]
    return "\n".join(parts)
