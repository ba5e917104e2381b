"""One measured strength of one method, and the table of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shrunk:
    """weights and cache: shares of the original's, of the whole model and of a token. torch, onnx: time as a share of the original's;
    None where it was not measured. loss: mean and half of the 95 % interval. parameters: numbers in all constants; cache_bytes: of a
    token in all layers."""

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
    parameters: int = 0
    cache_bytes: int = 0


def share(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}"


COLUMNS = ("method", "strength", "loss", "parameters", "cache bytes per token", "time, torch", "time, onnxruntime", "")


def table(rows: Sequence[Shrunk], notes: Sequence[str]) -> str:
    """Shares of the original's in brackets."""
    lines = ["# Smaller attention from the same weights", "", *(f"- {note}" for note in notes)]
    for model in dict.fromkeys(r.model for r in rows):
        lines += ["", f"## {model}", "", f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
        for r in (r for r in rows if r.model == model):
            loss = "" if r.loss is None or r.half is None else f"{r.loss:.2e} ± {r.half:.0e}"
            held = f"{r.parameters / 1e6:.2f} M ({share(r.weights)})", f"{r.cache_bytes} ({share(r.cache)})"
            lines.append(f"| {' | '.join((r.method, r.strength, loss, *held, share(r.torch), share(r.onnx), r.note))} |")
    return "\n".join(lines) + "\n"


def compared_by_hand(rows: Sequence[Shrunk]) -> list[str]:
    """What the table says of groupings of equal size beside each other, and of the smallest loss at a cache of 60 %."""
    said = []
    for model in dict.fromkeys(r.model for r in rows):
        losses = {(r.method, r.strength): r.loss for r in rows if r.model == model and r.loss is not None}
        for method, strength in [key for key in losses if key[0] == "mean-pooling"]:
            others = ("weighted-groups, not aligned", "weighted-groups")
            found = [f"{name} {losses[name, strength]:.3g}" for name in others if (name, strength) in losses]
            if found:
                said.append(f"{model}, {strength}: loss of mean pooling {losses[method, strength]:.3g}, of {', of '.join(found)}")
        small = [r for r in rows if r.model == model and r.strength.startswith("cache at most") and r.half is not None]
        said += [f"{model}, eigen-attention at {r.cache:.2f} of the cache: loss {r.loss:.3g} ± {r.half:.1g}" for r in small]
    return said
