"""Weights in few bits: loss against bits per weight for every method, on torch with inputs in float32: only the weights differ.

A run ends after MINUTES: what was not reached is named below the table. Times and files are the part `runtimes`.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import torch

from attnopt.ir.site import Refusal
from attnopt.passes.weight_rounding import Wish
from quantize.methods import methods
from quantize.subjects import Measured, Subject, code_lm, sentence_encoder

WISHES = [Wish(4, 32), Wish(3, 32), Wish(4, 0), Wish(8, 0), Wish(3, 0), Wish(4, 128)]
MINUTES = 9.0
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


def run(quick: bool, resume: bool = False) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    started, left = time.monotonic(), list[str]()
    notes = [
        "losses: mean over independent samples ± half of the 95 % interval; below 1 in the last column is better than round-to-nearest",
        "bits per weight count float32 steps; 3-bit codes have no kernel in onnxruntime and would be stored in 4 bits",
        "QuEST in groups is an extension: its authors have one step for a row; RTN has the best clip of each group",
    ]
    with tempfile.TemporaryDirectory() as folder:
        subjects = [make(Path(folder), quick) for make in (code_lm, sentence_encoder)]
        earlier = harness.kept("quantize_weights", Loss) if resume else []
        exact = [Loss(s.name, 32, "", "float32", 32.0, 0.0, 0.0, s.perplexity, None) for s in subjects]
        losses = exact + [x for x in earlier if x.bits < 32]
        for wish in QUICK if quick else WISHES:
            for subject in subjects:
                if time.monotonic() - started > 60 * MINUTES:
                    left.append(f"{subject.name} {wish.bits} bits, {f'groups of {wish.most}' if wish.most else 'rows'}")
                    continue
                for each in lost(subject, wish, losses):
                    losses.append(each)
                    print(f"{time.monotonic() - started:4.0f} s  {each}", flush=True)
                    keep(losses, notes, quick)
        if left:
            notes.append(f"not reached in {MINUTES:g} minutes: {'; '.join(left)}")
    keep(losses, notes, quick)
    print(text_of(losses, notes))
    for each in losses:
        if each.model == "code-lm" and each.bits == 8 and each.method == "RTN" and each.loss >= INT8_GOAL:
            print(f"int8 weights lose {each.loss:.1e}, not under {INT8_GOAL:g}")


def keep(losses: list[Loss], notes: list[str], quick: bool) -> None:
    """Write what there is so far: a run takes long, and may be cut off."""
    if not quick:
        path = harness.save("quantize_weights", losses, notes)
        path.with_suffix(".md").write_text(text_of(losses, notes))


def text_of(losses: list[Loss], notes: list[str]) -> str:
    return "\n".join([loss_table(losses), *(f"- {n}" for n in notes), ""])


def lost(subject: Subject, wish: Wish, known: Sequence[Loss]) -> Iterator[Loss]:
    """Every method at one width and group that is not known; the baseline comes first."""
    group = str(wish.most) if wish.most else "row"
    there = {x.method: x for x in known if (x.model, x.bits, x.group) == (subject.name, wish.bits, group)}
    plain = there["RTN"].loss if "RTN" in there else None
    left = tuple(m.name for m in methods(wish) if m.name not in there)
    for method, found in subject.bench.rows(wish, left) if left else ():
        if isinstance(found, Refusal):
            yield Loss(subject.name, wish.bits, group, method.name, 0.0, 0.0, 0.0, None, None, f"refused: {found}")
            continue
        host, width = found
        loss, perplexity = subject.loss(host.runner())
        plain = loss.mean if plain is None else plain
        ratio = loss.mean / plain
        made = Loss(subject.name, wish.bits, group, method.name, width, loss.mean, loss.half, perplexity, ratio, method.note)
        yield made


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
