"""Predicted against measured time of attention kernels on a GPU that is here: Triton's beside torch's own.

    python benchmarks/cost_model.py --target h200 [--seconds 300]

The cases are those of `gpu_attention.py`, important ones first. A third of them, by hash, fits the shares of the kernels; the others
judge two predictions: with the shares that are shipped, and with the fitted ones. What asks for no more than the first is a plan made on
another machine. Results go to benchmarks/results/cost_model_<target>.json and .md, and to $OUT too; the fitted target beside them as .toml,
which `ship_efficiencies.py` takes.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import harness
import torch
from cost_model import PART, Judged, failing, missed, regrets, summary, verdict
from gpu.ahead import compile_ahead
from gpu.case import Case
from gpu.cost_points import DTYPE, Timer, cases, of_fit, on_gpu, points, sample, shape_of
from gpu.device import described, unusable
from gpu.measure import NOT_REACHED
from gpu.peers import GpuLost

from attnopt.cost.estimate import estimate
from attnopt.cost.fit import Sample, fit
from attnopt.cost.target import Target, load_target
from attnopt.cost.target_file import as_toml, target_data

COLUMNS = ["kernel", "points", "Kendall's tau", "median error", "error of 9 in 10"]


@dataclass
class Measured:
    """Seconds by case and kernel, and what was not measured."""

    seconds: dict[Case, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def measure(cases: Sequence[Case], device: torch.device, deadline: float, timer: Timer) -> Measured:
    """Case by case until the deadline, or until the GPU stops."""
    found, left = Measured(), list(points(cases))
    while left and time.monotonic() < deadline:
        case, names = left.pop(0)
        try:
            found.seconds[case], reasons = timer(case, names, device)
        except GpuLost as failure:
            found.notes.append(f"the GPU stopped at {case.name}: {failure}")
            break
        except torch.OutOfMemoryError:
            reasons = {"all": "out of memory"}
        found.notes += [f"{case.name}, {name}: {why}" for name, why in reasons.items()]
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if left:
        found.notes.append(f"{NOT_REACHED} ({len(left)} cases): {', '.join(case.name for case, _ in left)}")
    return found


def fitted(target: Target, found: Measured) -> Target:
    """The target with shares of the kernels that a third of the cases explains."""
    samples = list[Sample]()
    for case, seconds in found.seconds.items():
        if of_fit(case, PART):
            samples += [sample(case, kernel, s, target) for kernel, s in seconds.items()]
    return replace(target, efficiencies=fit(samples, target), measured=datetime.date.today().isoformat())


def judged(target: Target, found: Measured) -> list[Judged]:
    """The cases that the fit has not seen."""
    made = []
    for case, seconds in found.seconds.items():
        shape = shape_of(case)
        sizes = " ".join(f"{axis}={size}" for axis, size in shape.items())
        for kernel, spent in seconds.items() if not of_fit(case, PART) else ():
            known = estimate(case.spec, shape, DTYPE, kernel, target=target)
            made.append(Judged(case.spec, sizes, kernel, known.seconds, spent, known.bound))
    return made


def report(target: Target, found: Measured, head: Iterable[str]) -> tuple[str, dict[str, object], str]:
    """(text, record, what the fitted model misses)."""
    parts, record, reason = [], dict[str, object](), ""
    for name, known in (("fitted on the other cases", fitted(target, found)), ("as shipped", target)):
        rows_ = judged(known, found)
        choices = regrets(rows_)
        table, numbers = summary(rows_, choices)
        parts += [f"Shares {name}:\n", harness.markdown(COLUMNS, table), *(f"- {line}" for line in verdict(numbers)), ""]
        record[name] = {"summary": numbers, "rows": [vars(r) for r in rows_]}
        if known is not target:
            reason = failing(numbers)
            record["efficiencies"] = {family: vars(e) for family, e in known.efficiencies.items()}
            parts += [f"Choices that were more than 5 % behind the best, shares {name}:\n", missed(choices)]
    notes = [*head, *found.notes]
    return "\n".join([*(f"- {n}" for n in notes), "", *parts]) + "\n", {"notes": notes, **record}, reason


def run(name: str, seconds: float, *, timer: Timer = on_gpu, device: torch.device | None = None, out: Path | None = None) -> None:
    """Measure, fit, judge, write. timer, device, out: where there is no GPU, a test's."""
    target, _ = load_target(name)
    if target.kind != "gpu":
        sys.exit(f"'{name}' is no GPU: leave --target out to measure this CPU")
    if device is None and (why := unusable()) is not None:
        print(f"nothing is measured: {why}")
        return
    started = time.monotonic()
    device = device or torch.device("cuda")
    late = compile_ahead([case for case, _ in points(cases())], target.arch) if device.type == "cuda" else ""
    found = measure(cases(), device, started + seconds, timer)
    about = described(device)
    head = [
        f"{about['name']}, torch {about['versions']['torch']}, triton {about['versions']['triton']}, bfloat16",
        *([late] * bool(late)),
    ]
    text, record, reason = report(target, found, head)
    print(text)
    given = os.environ.get("OUT")
    for folder in (out,) if out else (harness.RESULTS, *([Path(given)] if given else [])):
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"cost_model_{name}", text, {"device": about, **record}, fitted(target, found))
    if reason:
        sys.exit(reason)


def write(path: Path, text: str, record: dict[str, object], target: Target) -> None:
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    path.with_suffix(".json").write_text(harness.as_json(record), encoding="utf-8")
    path.with_suffix(".toml").write_text(as_toml(target_data(target)) + "\n", encoding="utf-8")
