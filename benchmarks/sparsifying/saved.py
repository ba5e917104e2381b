"""What a run has measured so far: written after every row, so that one that was interrupted goes on where it was.

benchmarks/results/sparsify.json   <->   {"losses": [Loss, …], "corrections": […], "times": […], "plans": […]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import harness

NAME = "sparsify"
Rows = dict[str, list[Any]]


def read(kinds: Mapping[str, Callable[..., Any]]) -> Rows:
    """The rows of earlier runs by part. kinds: what makes a row of each part from its fields."""
    path = harness.RESULTS / f"{NAME}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return {part: [kind(**row) for row in rows if row["part"] == part] for part, kind in kinds.items()}


def save(found: Rows, notes: Sequence[str], text: str) -> None:
    path = harness.save(NAME, [row for rows in found.values() for row in rows], notes)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
