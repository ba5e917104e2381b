"""Smaller attention from the same weights: what each method loses against the time, parameters and cache that it saves.

    python benchmarks/shrink.py [--resume] [--quick]

Losses: the reference language model (KL on held-out documents) and MiniLM (1 - cosine), mean over samples and half of a 95 % interval.
Times: one thread, before and after in turn, medians of paired ratios, torch and onnxruntime. Large random models are timed only. Results
go to benchmarks/results/shrink.json and .md after every row, and --resume goes on where a run was interrupted; no timing means anything
on a loaded machine, so it asks for a quiet one (--loaded to go on).
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import harness
import torch
from quantize.subjects import Subject, code_lm, sentence_encoder
from shrinking.gate_norm_scores import ranking, scored
from shrinking.kept import Kept
from shrinking.methods import droppable, dropped, evidence_of, kinds_of, layer_losses
from shrinking.planned import KINDS, searched
from shrinking.random_models import expected, rows_of, shaped
from shrinking.timing import compared, onnx_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few samples and methods: to see that it runs; nothing is kept")
    parser.add_argument("--resume", action="store_true", help="go on from the rows that are there")
    parser.add_argument("--loaded", action="store_true", help="go on beside other processes")
    given = parser.parse_args()
    busy = harness.busy_share() if given.quick or given.loaded else harness.require_quiet()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    kept = Kept.read() if given.resume and not given.quick else Kept(saves=not given.quick)
    said = f"one thread, in turn, medians of paired ratios; other processes used {busy:.2f} cores at the start"
    kept.say("machine", lambda: [said])
    kept.say("gate-norm seconds", lambda: scored(4 if given.quick else 40))
    with tempfile.TemporaryDirectory() as folder:
        for make in (code_lm, sentence_encoder):
            trained(make(Path(folder), given.quick), kept, given.quick)
    for model in shaped(given.quick):
        kept.add(rows_of(model, kept))
        kept.say(f"{model.name}, a quarter", lambda model=model: expected(model, kept.rows))  # type: ignore[misc]
    print(kept.text())


def trained(subject: Subject, kept: Kept, quick: bool) -> None:
    """Each method alone, then the planner with all of them, without light tuning and with it."""
    exported = onnx_of(subject.torch)
    kept.add(
        compared(
            subject, kinds_of(subject, subject.torch, quick, fits=True), kinds_of(subject, exported, quick), exported, kept, quick
        )
    )
    losses = layer_losses(subject)
    named = dict(zip(losses, (name for name, _ in droppable(exported).candidates), strict=True))
    twins = dropped({named[name]: loss for name, loss in losses.items()}, exported)
    kept.add(compared(subject, dropped(losses, subject.torch, evidence_of(subject, subject.torch)), twins, exported, kept, quick))
    kept.say(f"{subject.name}, rho", lambda: ranking(subject, losses))
    for kind in () if quick else KINDS:  # a search needs more samples than a quick run has
        searched(subject, kind, kept)


if __name__ == "__main__":
    main()
