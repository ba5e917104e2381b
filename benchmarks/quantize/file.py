"""A file in, a file out: `attnopt optimize model.onnx --budget 0.01` beside onnxruntime's quantize_dynamic, on the same exports.

Each model is written as ONNX and its calibration texts as .npz, as a user has them; attnopt is run by its command line. The budget is in
nats of KL for the language model and in 1 - cosine for the encoder. Losses are on texts that neither saw, times are of all files in turn.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import harness
import numpy as np
import torch

from attnopt.hosts.onnx import OnnxHost
from attnopt.plan.timing.timing import Timing, in_turn
from quantize import peers
from quantize.side_by_side import LENGTHS, Run, inputs_of, speed
from quantize.subjects import Measured, Subject, code_lm, minilm, sentence_encoder

BUDGETS = {"code-lm": (0.01,), "minilm": (0.01, 0.008)}  # the second so that no more is lost than by steps for each channel
SECONDS = 2.0  # for one length, all files in turn
METRICS = {"code-lm": "kl", "minilm": "cosine"}
MORE = 72  # texts beside those that other parts calibrate on: a budget near its end needs a narrow bound
OURS = "attnopt optimize --budget "
QUICK = ("--passes", "dynamic-int8,round-tables")


@dataclass(frozen=True)
class FileRun(Run):
    """against: of one of our files, by the name of another's (low, median, high) of its speed over that one's for each length."""

    against: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)


def run(quick: bool, resume: bool = False) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    busy = harness.busy_share()
    notes = [
        f"timed on {torch.get_num_threads()} thread, in turn; other processes used {busy:.2f} cores at the start",
        "losses: mean over independent samples ± half of the 95 % interval; speeds: median of paired ratios and its 95 % interval",
    ]
    runs = harness.kept("quantize_file", FileRun) if resume else list[FileRun]()
    with tempfile.TemporaryDirectory() as folder:
        for make in (code_lm, sentence_encoder):
            subject = make(Path(folder), quick)
            if any(x.model == subject.name for x in runs):  # its files were timed in turn: all of them are there
                continue
            runs += compared(subject if quick else with_more_data(subject), QUICK if quick else ())
            if not quick:
                harness.save("quantize_file", runs, notes).with_suffix(".md").write_text(text_of(runs, notes))
    print(text_of(runs, notes))


def with_more_data(subject: Subject) -> Subject:
    """The encoder with more texts to calibrate on, none of which it is judged on."""
    if subject.name != "minilm":
        return subject
    known = set(minilm.calibration_texts(168))
    texts = [t for t in minilm.calibration_texts(1000) if t not in known][:MORE]
    more = [minilm.tokens(texts[i : i + 8], 64) for i in range(0, len(texts), 8)]
    return replace(subject, calibration=[*subject.calibration, *more])


def compared(subject: Subject, more: tuple[str, ...]) -> list[FileRun]:
    """The float file, ours, and both of onnxruntime's: bytes, loss, times and speeds."""
    paths, said = {"float32 export": subject.path}, dict[str, str]()
    for budget in BUDGETS[subject.name]:
        name = f"{OURS}{budget}"
        paths[name], said[name] = optimized(subject, budget, more)
    paths["onnxruntime quantize_dynamic"] = peers.dynamic(subject, False)
    paths["onnxruntime quantize_dynamic per channel"] = peers.dynamic(subject, True)
    runners: dict[str, Callable] = {name: OnnxHost.from_model(path).runner() for name, path in paths.items()}  # type: ignore[type-arg]
    losses: dict[str, Measured] = {name: subject.loss(each)[0] for name, each in runners.items()}
    made = {
        name: FileRun(subject.name, name, path.stat().st_size, losses[name].mean, losses[name].half, note=said.get(name, ""))
        for name, path in paths.items()
    }
    for length in LENGTHS:
        given = inputs_of(subject, length)
        times = in_turn({name: (lambda each=each, given=given: each(given)) for name, each in runners.items()}, seconds=SECONDS)
        made = {name: timed(x, times) for name, x in made.items()}
    return list(made.values())


def timed(run: FileRun, times: dict[str, Timing]) -> FileRun:
    own, against = times[run.contender], run.against
    if run.contender.startswith(OURS):
        against = {n: (*against.get(n, ()), speed(x, own)) for n, x in times.items() if "quantize_dynamic" in n}
    speeds = (*run.speeds, speed(times["float32 export"], own))
    return replace(run, times=(*run.times, own.median), speeds=speeds, against=against)


def optimized(subject: Subject, budget: float, more: tuple[str, ...]) -> tuple[Path, str]:
    """(the file that the command line writes, what of its report tells the plan). Raises RuntimeError where the command fails."""
    data, path = subject.folder / f"{subject.name}.npz", subject.folder / f"{subject.name}-attnopt-{budget}.onnx"
    longest = max(next(iter(batch.values())).shape[1] for batch in subject.calibration)
    padded = [
        {n: torch.nn.functional.pad(x, (0, longest - x.shape[1])) for n, x in batch.items()} for batch in subject.calibration
    ]
    np.savez(data, **{n: torch.cat([batch[n] for batch in padded]).numpy() for n in padded[0]})
    asked = f"--budget {budget} --metric {METRICS[subject.name]} --target cpu+onnxruntime".split()
    command = [sys.executable, "-m", "attnopt", "optimize", str(subject.path), "--output", str(path), *asked, *more]
    command += ["--calibration", str(data)]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"})
    if found.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {found.stderr[-400:]}")
    print(found.stdout, flush=True)
    kept = [x.partition(": kept, ") for x in found.stdout.splitlines()]
    return path, "; ".join(f"{name}: {what.partition(': mean')[0]}" for name, is_kept, what in kept if is_kept)


def text_of(runs: list[FileRun], notes: list[str]) -> str:
    others = [x for x in runs if "quantize_dynamic" in x.contender]
    closing = [verdict(x, [o for o in others if o.model == x.model]) for x in runs if x.contender.startswith(OURS)]
    title = "# One command on one file, beside onnxruntime's dynamic quantisation\n"
    return "\n".join([title, table(runs), *(f"- {n}" for n in (*notes, *closing)), ""])


def table(runs: list[FileRun]) -> str:
    rows = []
    for x in runs:
        loss = "" if x.loss is None else str(Measured(x.loss, x.half or 0.0))
        pairs = zip(x.times, x.speeds, strict=True)
        times = [f"{t * 1e3:.2f} ms, {mid:.2f}x ({low:.2f} to {high:.2f})" for t, (low, mid, high) in pairs]
        rows.append([x.model, x.contender, "" if x.bytes is None else f"{x.bytes / 1e6:.2f}", loss, *times, x.note])
    return harness.markdown(["model", "file", "MB", "loss", *(f"{n} tokens" for n in LENGTHS), "plan"], rows)


def verdict(ours: FileRun, others: list[FileRun]) -> str:
    """How a file of ours stands to each of the others: size, loss, and speed by the interval of paired ratios."""
    stands = (f"{holds(ours, x)} beside {x.contender} ({', '.join(said(ours, x))})" for x in others)
    return f"{ours.model}, {ours.contender.removeprefix('attnopt optimize ')}: {'; '.join(stands)}"


def holds(ours: FileRun, other: FileRun) -> str:
    smaller, loses_less = numbers(ours)[0] < numbers(other)[0], numbers(ours)[1] <= numbers(other)[1]
    faster = all(low > 1.0 for low, _, _ in ours.against[other.contender])
    return "reached" if smaller and loses_less and faster else "not reached"


def said(ours: FileRun, other: FileRun) -> list[str]:
    (size, loss), (theirs, lost) = numbers(ours), numbers(other)
    speeds = [
        f"{'faster' if low > 1.0 else 'slower' if high < 1.0 else 'as fast'} at {n} tokens, {mid:.2f}x ({low:.2f} to {high:.2f})"
        for n, (low, mid, high) in zip(LENGTHS, ours.against[other.contender], strict=True)
    ]
    return [f"{size / theirs:.2f} of the bytes", f"{loss / lost:.2f} of the loss", *speeds]


def numbers(run: FileRun) -> tuple[int, float]:
    assert run.bytes is not None and run.loss is not None
    return run.bytes, run.loss
