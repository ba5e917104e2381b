"""One measured strength of one method, and the table of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shrunk:
    """weights and cache: shares of the original's, of the whole model and of a token. torch, onnx: time as a share of the original's;
    None where it was not measured. loss: mean and half of the 95 % interval."""

    model: str
    method: str
    strength: str
    loss: float | None
    half: float | None
    weights: float
    cache: float
    torch: float | None = None
    onnx: float | None = None
    note: str = ""


def share(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}"


def table(rows: Sequence[Shrunk], notes: Sequence[str]) -> str:
    lines = ["# Smaller attention from the same weights", "", *(f"- {note}" for note in notes)]
    for model in dict.fromkeys(r.model for r in rows):
        lines += ["", f"## {model}", "", "| method | strength | loss | weights | cache | time, torch | time, onnxruntime | |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        for r in (r for r in rows if r.model == model):
            loss = "" if r.loss is None or r.half is None else f"{r.loss:.2e} ± {r.half:.0e}"
            cells = (r.method, r.strength, loss, share(r.weights), share(r.cache), share(r.torch), share(r.onnx), r.note)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
