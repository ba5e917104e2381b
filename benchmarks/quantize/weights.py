"""Weights in few bits: loss against bits per weight for every method, and what each storage takes in time beside its peers.

One table of losses, on torch with inputs in float32, so that only the weights differ; one of models as onnxruntime and torch run them, with
inputs as their kernels round them, with file size and time at one row and at a whole text, run in turn.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import harness
import torch

from attnopt.ir.site import Refusal
from attnopt.passes.weight_rounding import Wish
from quantize.methods import Bench
from quantize.side_by_side import LENGTHS, Run, run_side_by_side
from quantize.subjects import Measured, Subject, code_lm, sentence_encoder

WISHES = [Wish(bits, most) for bits in (8, 4, 3) for most in (0, 128, 32)]
STORED = [Wish(8, 128), Wish(4, 128), Wish(4, 32), Wish(4, 0)]
QUICK = [Wish(4, 32)]
INT8_GOAL = 1e-3  # KL


@dataclass(frozen=True)
class Loss:
    """One method at one width and group. ratio: of its loss to that of RTN at the same."""

    model: str
    bits: int
    group: str
    method: str
    width: float
    loss: float
    half: float
    perplexity: float | None
    ratio: float | None
    note: str = ""


def run(quick: bool) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    busy = harness.busy_share()
    losses: list[Loss] = []
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        for make in (code_lm, sentence_encoder):
            subject = make(Path(folder), quick)
            losses += lost(subject, QUICK if quick else WISHES)
            runs += run_side_by_side(subject, QUICK if quick else STORED)
    notes = [
        "losses: mean over independent samples ± half of the 95 % interval; below 1 in the last column is better than round-to-nearest",
        "bits per weight count float32 steps; 3-bit codes have no kernel in onnxruntime and would be stored in 4 bits",
        "QuEST in groups is an extension: its authors have one step for a row; RTN has the best clip of each group",
        f"timed on {torch.get_num_threads()} thread, in turn, medians of paired ratios; other processes used {busy:.2f} cores at the start",
    ]
    text = "\n".join([loss_table(losses), run_table(runs), *(f"- {n}" for n in notes), ""])
    print(text)
    if not quick:
        path = harness.save("quantize_weights", losses, notes, {"runs": [vars(r) for r in runs]})
        path.with_suffix(".md").write_text(text)
    for each in losses:
        if each.model == "code-lm" and each.bits == 8 and each.method == "RTN" and each.loss >= INT8_GOAL:
            print(f"int8 weights lose {each.loss:.1e}, not under {INT8_GOAL:g}")


def lost(subject: Subject, wishes: list[Wish]) -> list[Loss]:
    bench = Bench(subject, subject.torch)
    _, perplexity = subject.loss(subject.torch.runner())
    made = [Loss(subject.name, 32, "", "float32", 32.0, 0.0, 0.0, perplexity, None)]
    plain: dict[Wish, float] = {}
    for wish, method, found in bench.rows(wishes):
        group = str(wish.most) if wish.most else "row"
        if isinstance(found, Refusal):
            made.append(Loss(subject.name, wish.bits, group, method.name, 0.0, 0.0, 0.0, None, None, f"refused: {found}"))
            continue
        host, width = found
        loss, perplexity = subject.loss(host.runner())
        if method.name == "RTN":
            plain[wish] = loss.mean
        ratio = loss.mean / plain[wish] if wish in plain else None
        made.append(
            Loss(subject.name, wish.bits, group, method.name, width, loss.mean, loss.half, perplexity, ratio, method.note)
        )
        print(made[-1], flush=True)
    return made


def loss_table(losses: list[Loss]) -> str:
    rows = []
    for x in losses:
        said = x.note if x.note.startswith("refused") else ""
        loss = said or ("0" if x.method == "float32" else str(Measured(x.loss, x.half)))
        against = "" if x.ratio is None else f"{x.ratio:.2f}"
        rows.append(
            [
                x.model,
                str(x.bits),
                x.group,
                x.method,
                f"{x.width:.2f}",
                loss,
                f"{x.perplexity:.3f}" if x.perplexity else "",
                against,
            ]
        )
    return harness.markdown(["model", "bits", "group", "method", "bits/weight", "loss", "perplexity", "of RTN"], rows)


def run_table(runs: list[Run]) -> str:
    rows = []
    for x in runs:
        loss = "" if x.loss is None else str(Measured(x.loss, x.half or 0.0))
        times = [f"{t * 1e3:.2f} ms ({s:.2f}x)" for t, s in zip(x.times, x.speeds, strict=True)] or [""] * len(LENGTHS)
        rows.append([x.model, x.contender, "" if x.bytes is None else f"{x.bytes / 1e6:.2f}", loss, *times, x.note])
    return harness.markdown(["model", "contender", "MB", "loss", *(f"{n} tokens" for n in LENGTHS), "note"], rows)
