"""What all benchmarks share: a quiet machine, contenders run in turn, results kept with what they were made on."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("attnopt", "torch", "onnxruntime", "onnx", "onnx-ir", "onnxscript", "transformers")
R = TypeVar("R")
LOADED = 0.3  # of one core used by others: more, and timings mean nothing


def busy_share(seconds: float = 1.0) -> float:
    """Cores in use by all processes over a short idle wait, from the system's own counters."""

    def ticks() -> tuple[int, int]:
        numbers = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        return sum(numbers) - numbers[3] - numbers[4], sum(numbers)

    try:
        used, total = ticks()
    except (OSError, ValueError, IndexError):
        return os.getloadavg()[0]
    time.sleep(seconds)
    used_after, total_after = ticks()
    return (used_after - used) / max(1, total_after - total) * (os.cpu_count() or 1)


def require_quiet() -> float:
    """Cores that others use; exits where it is too much to measure beside."""
    share = min(busy_share() for _ in range(3))
    if share > LOADED:
        sys.exit(f"the machine is loaded: other processes use {share:.2f} cores; stop them and run this again")
    return share


def machine() -> dict[str, Any]:
    """Processor, cores and package versions."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), model)
    except OSError:
        pass
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


@dataclass(frozen=True)
class Row:
    """One contender in one setting: seconds per call (median), time relative to the baseline of the same setting, loss."""

    setting: str
    contender: str
    seconds: float
    ratio: float
    loss: float | None = None
    note: str = ""


def save(name: str, rows: Sequence[Any], notes: Sequence[str] = (), extra: Mapping[str, Any] | None = None) -> Path:
    """Write benchmarks/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {"machine": machine(), "notes": list(notes), **(extra or {}), "rows": [vars(r) for r in rows]}
    path.write_text(as_json(record))
    return path


def kept(name: str, kind: type[R]) -> list[R]:
    """The rows of an earlier run; none where there was none, or its rows were of another form."""
    try:
        rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        return [kind(**{key: tuple(x) if isinstance(x, list) else x for key, x in row.items()}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def as_json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
