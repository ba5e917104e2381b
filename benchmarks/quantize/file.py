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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import harness
import numpy as np
import torch

from attnopt.hosts.onnx import OnnxHost
from attnopt.plan.timing.timing import Timing, in_turn
from quantize import peers
from quantize.side_by_side import LENGTHS, Run, inputs_of, speed
from quantize.subjects import Measured, Subject, code_lm, minilm, sentence_encoder

BUDGET = 0.01
SECONDS = 2.0  # for one length, all files in turn
METRICS = {"code-lm": "kl", "minilm": "cosine"}
MORE = 72  # texts beside those that other parts calibrate on: a budget near its end needs a narrow bound
OURS = "attnopt optimize --budget 0.01"
QUICK = ("--passes", "dynamic-int8,round-tables")


def run(quick: bool, resume: bool = False) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    busy = harness.busy_share()
    notes = [
        f"timed on {torch.get_num_threads()} thread, in turn; other processes used {busy:.2f} cores at the start",
        "losses: mean over independent samples ± half of the 95 % interval; speeds: median of paired ratios and its 95 % interval",
    ]
    runs = harness.kept("quantize_file", Run) if resume else list[Run]()
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


def compared(subject: Subject, more: tuple[str, ...]) -> list[Run]:
    """The float file, ours, and both of onnxruntime's: bytes, loss, times and speeds."""
    paths, said = {"float32 export": subject.path}, dict[str, str]()
    paths[OURS], said[OURS] = optimized(subject, more)
    paths["onnxruntime quantize_dynamic"] = peers.dynamic(subject, False)
    paths["onnxruntime quantize_dynamic per channel"] = peers.dynamic(subject, True)
    runners: dict[str, Callable] = {name: OnnxHost.from_model(path).runner() for name, path in paths.items()}  # type: ignore[type-arg]
    losses: dict[str, Measured] = {name: subject.loss(each)[0] for name, each in runners.items()}
    made = {
        name: Run(subject.name, name, path.stat().st_size, losses[name].mean, losses[name].half, note=said.get(name, ""))
        for name, path in paths.items()
    }
    for length in LENGTHS:
        given = inputs_of(subject, length)
        times = in_turn({name: (lambda each=each, given=given: each(given)) for name, each in runners.items()}, seconds=SECONDS)
        made = {name: timed(x, times["float32 export"], times[name]) for name, x in made.items()}
    return list(made.values())


def timed(run: Run, plain: Timing, own: Timing) -> Run:
    return replace(run, times=(*run.times, own.median), speeds=(*run.speeds, speed(plain, own)))


def optimized(subject: Subject, more: tuple[str, ...]) -> tuple[Path, str]:
    """(the file that the command line writes, what of its report tells the plan). Raises RuntimeError where the command fails."""
    data, path = subject.folder / f"{subject.name}.npz", subject.folder / f"{subject.name}-attnopt.onnx"
    longest = max(next(iter(batch.values())).shape[1] for batch in subject.calibration)
    padded = [
        {n: torch.nn.functional.pad(x, (0, longest - x.shape[1])) for n, x in batch.items()} for batch in subject.calibration
    ]
    np.savez(data, **{n: torch.cat([batch[n] for batch in padded]).numpy() for n in padded[0]})
    asked = [
        "--budget",
        f"{BUDGET}",
        "--metric",
        METRICS[subject.name],
        "--calibration",
        str(data),
        "--target",
        "cpu+onnxruntime",
    ]
    command = [sys.executable, "-m", "attnopt", "optimize", str(subject.path), "--output", str(path), *asked, *more]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"})
    if found.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {found.stderr[-400:]}")
    print(found.stdout, flush=True)
    kept = [x.partition(": kept, ") for x in found.stdout.splitlines()]
    return path, "; ".join(f"{name}: {what.partition(': mean')[0]}" for name, is_kept, what in kept if is_kept)


def text_of(runs: list[Run], notes: list[str]) -> str:
    closing = [verdict([x for x in runs if x.model == name]) for name in dict.fromkeys(x.model for x in runs)]
    title = "# One command on one file, beside onnxruntime's dynamic quantisation\n"
    return "\n".join([title, table(runs), *(f"- {n}" for n in (*notes, *closing)), ""])


def table(runs: list[Run]) -> str:
    rows = []
    for x in runs:
        loss = "" if x.loss is None else str(Measured(x.loss, x.half or 0.0))
        pairs = zip(x.times, x.speeds, strict=True)
        times = [f"{t * 1e3:.2f} ms, {mid:.2f}x ({low:.2f} to {high:.2f})" for t, (low, mid, high) in pairs]
        rows.append([x.model, x.contender, "" if x.bytes is None else f"{x.bytes / 1e6:.2f}", loss, *times, x.note])
    return harness.markdown(["model", "file", "MB", "loss", *(f"{n} tokens" for n in LENGTHS), "plan"], rows)


def verdict(runs: list[Run]) -> str:
    """Whether our file is smaller, faster and loses no more than each of the others; what of it does not hold is named."""
    ours = next(x for x in runs if x.contender == OURS)
    said = []
    for other in (x for x in runs if "quantize_dynamic" in x.contender):
        lacks = [what for what, holds in compared_with(ours, other).items() if not holds]
        said.append(
            f"than {other.contender} {'smaller, faster, and loses no more' if not lacks else 'not ' + ', not '.join(lacks)}"
        )
    return f"{ours.model}: {'; '.join(said)}"


def compared_with(ours: Run, other: Run) -> dict[str, bool]:
    assert ours.bytes is not None and other.bytes is not None and ours.loss is not None and other.loss is not None
    faster = {f"faster at {n} tokens": a <= b for n, a, b in zip(LENGTHS, ours.times, other.times, strict=True)}
    return {"smaller": ours.bytes < other.bytes, **faster, "of equal or lower loss": ours.loss <= other.loss}
