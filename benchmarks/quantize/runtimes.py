"""Models with weights in few bits as onnxruntime and torch run them, inputs as their kernels round them, beside their own quantisers.

File size, loss, and time at one row and at a whole text, all contenders of a model in turn.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import tempfile
import warnings
from pathlib import Path

import harness
import torch

from attnopt.passes.weight_rounding import Wish
from quantize.side_by_side import LENGTHS, Run, run_side_by_side
from quantize.subjects import Measured, code_lm, sentence_encoder

STORED = [Wish(8, 128), Wish(4, 32)]
QUICK = [Wish(4, 32)]


def run(quick: bool, resume: bool = False) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    busy = harness.busy_share()
    there = importlib.util.find_spec("torchao") is not None
    notes = [
        f"timed on {torch.get_num_threads()} thread, in turn; other processes used {busy:.2f} cores at the start",
        f"torchao {importlib.metadata.version('torchao')}" if there else "torchao is not installed here",
        "losses: mean over independent samples ± half of the 95 % interval; speeds: median of paired ratios and its 95 % interval",
    ]
    runs = harness.kept("quantize_runtimes", Run) if resume else list[Run]()
    with tempfile.TemporaryDirectory() as folder:
        for make in (code_lm, sentence_encoder):
            subject = make(Path(folder), quick)
            if any(x.model == subject.name for x in runs):  # its contenders were timed in turn: all of them are there
                continue
            runs += run_side_by_side(subject, QUICK if quick else STORED)
            if not quick:
                path = harness.save("quantize_runtimes", runs, notes)
                path.with_suffix(".md").write_text(text_of(runs, notes))
    print(text_of(runs, notes))


def text_of(runs: list[Run], notes: list[str]) -> str:
    return "\n".join(["# Weights in few bits, as runtimes run them\n", table(runs), *(f"- {n}" for n in notes), ""])


def table(runs: list[Run]) -> str:
    rows = []
    for x in runs:
        loss = "" if x.loss is None else str(Measured(x.loss, x.half or 0.0))
        pairs = zip(x.times, x.speeds, strict=True)
        times = [f"{t * 1e3:.2f} ms, {mid:.2f}x ({low:.2f} to {high:.2f})" for t, (low, mid, high) in pairs] or [""] * len(
            LENGTHS
        )
        rows.append([x.model, x.contender, "" if x.bytes is None else f"{x.bytes / 1e6:.2f}", loss, *times, x.note])
    return harness.markdown(["model", "contender", "MB", "loss", *(f"{n} tokens" for n in LENGTHS), "note"], rows)
