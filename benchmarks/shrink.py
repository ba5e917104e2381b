"""Smaller attention from the same weights: what each method loses against the time, parameters and cache that it saves.

    python benchmarks/shrink.py [--quick]

Losses: the reference language model (KL on held-out documents) and MiniLM (1 - cosine), mean over samples and half of a 95 % interval.
Times: one thread, before and after in turn, medians of paired ratios, torch and onnxruntime. Large random models are timed only. Results
go to benchmarks/results/shrink.json and .md; no timing means anything on a loaded machine, so it asks for a quiet one (--loaded to go on).
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
from shrinking.gate_norm_scores import ranking, scoring_seconds
from shrinking.planned import plans
from shrinking.rows import Shrunk, table
from shrinking.timing import compared, random_models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few samples and methods: to see that it runs; nothing is kept")
    parser.add_argument("--loaded", action="store_true", help="go on beside other processes")
    given = parser.parse_args()
    busy = harness.busy_share() if given.quick or given.loaded else harness.require_quiet()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows: list[Shrunk] = []
    said: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        from quantize.subjects import code_lm, sentence_encoder

        for make in (code_lm, sentence_encoder):
            subject = make(Path(folder), given.quick)
            rows += compared(subject, given.quick)
            if subject.name == "code-lm" and not given.quick:  # a search needs more samples than a quick run has
                planned, ahead = plans(subject)
                rows += planned
                said.append(ahead)
        rho = ranking(Path(folder), given.quick)
    seconds = scoring_seconds(layers=4 if given.quick else 40)
    rows += random_models(given.quick)
    notes = [
        *said,
        f"one thread, in turn, medians of paired ratios; other processes used {busy:.2f} cores at the start",
        f"gate-norm, per head: {seconds:.3g} s on {os.cpu_count()} cores to score {4 if given.quick else 40} layers shaped "
        "like a model of 13 billion parameters (hidden 5120, 40 heads of 128), weights at hand",
        *(
            f"Spearman's rho of gate-norm ({flags}) with the measured loss of each layer of code-lm: {x:.2f}"
            for flags, x in rho.items()
        ),
    ]
    print(table(rows, notes))
    if not given.quick:
        harness.save("shrink", rows, notes)
        (harness.RESULTS / "shrink.md").write_text(table(rows, notes))


if __name__ == "__main__":
    main()
