"""The frontier: what a model costs in time and memory for what it may lose; as a table, JSON, and one HTML page with a picture.

attnopt explore model.onnx --calibration data.npz -o frontier.html
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attnopt.errors import OutputNotWritable
from attnopt.report.plan import Plan


@dataclass(frozen=True)
class Point:
    """One plan. seconds: of a call of the whole model, measured where `timed`, else predicted. weights, cache: bytes.

    loss: mean on the data held back; bound: its one-sided 95 % bound, None without such data. budget: what it was searched for, None
    for one kind of rewrite everywhere. best: whether no other point loses less and is faster, or loses less and is smaller.
    """

    name: str
    budget: float | None
    loss: float
    bound: float | None
    seconds: float
    weights: float
    cache: float
    rewrites: str
    plan: Plan
    timed: bool = True
    best: bool = True

    @property
    def memory(self) -> float:
        return self.weights + self.cache


@dataclass(frozen=True)
class Frontier:
    """Points from the exact plan on, by loss. target and metric name what is measured."""

    model: str
    target: str
    metric: str
    points: tuple[Point, ...]
    search: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def html(self) -> str:
        """One page without any other file: a picture and a table."""
        from attnopt.report.frontier_page import page

        return page(self)

    def save(self, path: str | Path) -> Path:
        """Write the page. Raises OutputNotWritable."""
        try:
            Path(path).write_text(self.html(), encoding="utf-8")
        except OSError as failure:
            raise OutputNotWritable(
                f"'{path}' cannot be written: {failure.strerror}", next_move="Choose another place."
            ) from None
        return Path(path)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        from attnopt.report.table import megabytes, milliseconds, table

        body = table("plan", "loss", "at most (95 %)", "time", "speed", "weights + cache", "rewrites")
        first = self.points[0].seconds
        for p in self.points:
            bound = "" if p.bound is None else f"{p.bound:.3g}"
            cells = (
                p.name,
                f"{p.loss:.3g}",
                bound,
                milliseconds(p.seconds),
                f"{first / p.seconds:.2f}x",
                megabytes(p.memory),
                p.rewrites,
            )
            body.add_row(*map(Text, cells), style=None if p.best else "dim")
        return Group(
            Text(f"{self.model} on {self.target}, loss in {self.metric}"), body, Text(self.search), *map(Text, self.notes)
        )

    def __str__(self) -> str:
        from attnopt.report.table import as_text

        return as_text(self)
