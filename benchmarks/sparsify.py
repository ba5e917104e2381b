"""Skipping what does not matter: what each way of choosing keys loses, beside chance and a window, and what time it saves.

    python benchmarks/sparsify.py [--quick] [--part losses|times]

On real queries, keys and values of the language model and of the recall model. Results go to benchmarks/results/sparsify.json and .md.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import harness
import torch
from sparse import losses, times

PARTS = ("losses", "times")
NOTES = (
    "form: what is added to `softmax scale causal`; kept: share of the visible pairs; recall: share of the softmax weight on kept pairs; "
    "error: of the outputs of single attentions, relative, mean over them",
    "chance: as many blocks of each row at random, the first and the last visible one among them; window: the last keys, as many pairs",
    "KL: in nats per token with every attention so computed, against the model as it is; mean ± half of the 95 % interval",
    "pages are chosen for each query alone, as in decoding; kept of a corrected form does not count its dense rows",
    "code-lm hardly looks beyond 64 tokens: a window looks good there. recall needs keys from anywhere",
    "times: q, k, v of one attention of code-lm repeated to the length (6 heads on 2, width 32); medians of runs in turn, choosing "
    "included; beside dense attention by the same kernels; tiles: share of the visible tiles that is visited",
)


def text_of(found: dict[str, list[object]]) -> str:
    parts = ["# Sparse attention\n", "\n".join(f"- {note}" for note in NOTES) + "\n"]
    if found.get("losses"):
        parts += ["## Loss\n", losses.table(found["losses"]), losses.goals(found["losses"])]
    if found.get("times"):
        parts += ["## Time\n", times.table(found["times"]), times.goals(found["times"])]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--quick", action="store_true", help="few samples and short: to see that it runs; nothing is kept")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found: dict[str, list[object]] = {}
    for part in given.part or PARTS:
        found[part] = []
        for row in {"losses": losses, "times": times}[part].rows(quick=given.quick):
            print(row, flush=True)
            found[part].append(row)
    if not given.quick:
        path = harness.save("sparsify", [row for rows in found.values() for row in rows], [*NOTES, "1 thread"])
        Path(path).with_suffix(".md").write_text(text_of(found))
    print(text_of(found))


if __name__ == "__main__":
    main()
