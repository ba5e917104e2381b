"""The same rounding as runtimes run it, beside their own quantisers: file, loss, and time at one token and at a whole text.

A speed is the median of the ratios of neighbouring calls, the float model's and the contender's, with its 95 % interval by order
statistics. torchao is measured on torch where it is installed (`pip install --no-deps torchao`); no row needs it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Host, Refusal
from attnopt.passes import DynamicInt8
from attnopt.passes.weight_rounding import Wish
from attnopt.plan.timing.timing import Timing, in_turn
from quantize import peers
from quantize.methods import Bench
from quantize.subjects import Measured, Subject

SHOWN = ("RTN", "RSQ", "QuEST")
LENGTHS = (1, 128)


@dataclass(frozen=True)
class Run:
    """One model as a runtime runs it: bytes of its file, loss, seconds and speed (low, middle, high) against the float export by length."""

    model: str
    contender: str
    bytes: int | None
    loss: float | None
    half: float | None
    times: tuple[float, ...] = ()
    speeds: tuple[tuple[float, float, float], ...] = ()
    note: str = ""


def run_side_by_side(subject: Subject, wishes: list[Wish]) -> list[Run]:
    bench = Bench(subject, subject.onnx)
    paths: dict[str, Path] = {"float32 export": subject.path}
    notes: dict[str, str] = {}
    for wish, (method, found) in ((w, row) for w in wishes for row in bench.rows(w, SHOWN)):
        name = f"attnopt {method.name} int{wish.bits} {f'group {wish.most}' if wish.most else 'row'}"
        if isinstance(found, Refusal):
            notes[name] = str(found)
        else:
            paths[name] = saved(found[0], subject.folder / f"{name.replace(' ', '-')}.onnx")
    dynamic = bench.applied(DynamicInt8())
    if not isinstance(dynamic, Refusal):
        paths["attnopt dynamic int8"] = saved(dynamic[0], subject.folder / "attnopt-dynamic.onnx")
    for name, make in PEERS.items():
        print(f"{subject.name}: {name}", flush=True)
        try:
            paths[name] = make(subject)
        except Exception as failure:  # a peer that cannot do it is a row that says so
            notes[name] = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"[:120]
    runners = {}
    for name, path in paths.items():
        runners[name] = OnnxHost.from_model(path).runner()
    made = timed(subject, runners, paths)
    made += [Run(subject.name, name, None, None, None, note=note) for name, note in notes.items()]
    return made + torch_peers(subject)


PEERS: dict[str, Callable[[Subject], Path]] = {
    "onnxruntime dynamic int8": lambda s: peers.dynamic(s, False),
    "onnxruntime dynamic int8 per channel": lambda s: peers.dynamic(s, True),
    "onnxruntime MatMulNBits RTN int8 group 128": lambda s: peers.blocks(s, 8, 128, "rtn"),
    "onnxruntime MatMulNBits RTN int4 group 128": lambda s: peers.blocks(s, 4, 128, "rtn"),
    "onnxruntime MatMulNBits RTN int4 group 32": lambda s: peers.blocks(s, 4, 32, "rtn"),
    "onnxruntime MatMulNBits HQQ int4 group 32": lambda s: peers.blocks(s, 4, 32, "hqq"),
    "onnxruntime MatMulNBits GPTQ int4 group 32": lambda s: peers.blocks(s, 4, 32, "gptq"),
}


def saved(host: Host, path: Path) -> Path:
    host.save(path, {})  # type: ignore[attr-defined]
    return path


def inputs_of(subject: Subject, length: int) -> dict[str, Tensor]:
    """One text of so many tokens: the first of the calibration data, one after the other."""
    return {
        name: torch.cat([batch[name].reshape(1, -1) for batch in subject.calibration], 1)[:, :length]
        for name in subject.calibration[0]
    }


def timed(subject: Subject, runners: dict[str, Callable], paths: dict[str, Path]) -> list[Run]:  # type: ignore[type-arg]
    losses: dict[str, Measured] = {name: subject.loss(run)[0] for name, run in runners.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    speeds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runners}
    for length in LENGTHS:
        given = inputs_of(subject, length)
        times = in_turn({name: (lambda run=run, given=given: run(given)) for name, run in runners.items()}, seconds=1.0)
        for name, each in times.items():
            seconds[name].append(each.median)
            speeds[name].append(speed(times["float32 export"], each))
    return [
        Run(
            subject.name,
            name,
            paths[name].stat().st_size,
            losses[name].mean,
            losses[name].half,
            tuple(seconds[name]),
            tuple(speeds[name]),
        )
        for name in runners
    ]


def speed(plain: Timing, other: Timing) -> tuple[float, float, float]:
    """(low, median, high) of the ratios of neighbouring runs: the median lies between the order statistics in 95 of 100 cases."""
    ratios = sorted(a / b for a, b in zip(plain.runs, other.runs, strict=True))
    count = len(ratios)
    away = 0.98 * math.sqrt(count)
    low, high = max(0, math.floor(count / 2 - away)), min(count - 1, math.ceil(count / 2 + away) - 1)
    return ratios[low], statistics.median(ratios), ratios[max(low, high)]


def torch_peers(subject: Subject) -> list[Run]:
    """torchao beside the float module, both on torch."""
    runs: dict[str, peers.Run] = {}
    made: list[Run] = []
    for kind in ("int8 weight-only", "int8 dynamic", "int4 weight-only"):
        try:
            runs[f"torchao {kind}"] = peers.torchao(subject, kind)
        except Exception as failure:
            made.append(
                Run(subject.name, f"torchao {kind}", None, None, None, note=f"{type(failure).__name__}: {str(failure)[:100]}")
            )
    if not runs:
        return made
    plain = subject.torch.runner()
    times: dict[str, list[tuple[float, tuple[float, float, float]]]] = {name: [] for name in runs}
    for length in LENGTHS:
        given = inputs_of(subject, max(length, 2))
        runners = {"float32": plain, **runs}
        calls = {name: (lambda run=run, given=given: run(given)) for name, run in runners.items()}
        found = in_turn(calls, seconds=1.0)
        for name in runs:
            times[name].append((found[name].median, speed(found["float32"], found[name])))
    for name, each in runs.items():
        loss, _ = subject.loss(each)
        made.append(
            Run(
                subject.name,
                name,
                None,
                loss.mean,
                loss.half,
                tuple(t for t, _ in times[name]),
                tuple(s for _, s in times[name]),
                "against float32 on torch; 2 rows where one is asked",
            )
        )
    return made
