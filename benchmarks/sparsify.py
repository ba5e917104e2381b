"""Skipping what does not matter: what each way of choosing keys loses, beside chance and a window, and what time it saves.

    python benchmarks/sparsify.py [--quick] [--part losses|corrections|times|steps|plans] [--resume]

On real queries, keys and values of the language model and of the recall model. Results go to benchmarks/results/sparsify.json and .md,
after every row: --resume goes on where a run was interrupted, and measures anew what lacks a number. Parts that are not asked for stay
as they were.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from sparsifying import corrections, losses, plans, saved, steps, times

PARTS = {"losses": losses, "corrections": corrections, "times": times, "steps": steps, "plans": plans}
TITLES = {
    "losses": "Loss",
    "corrections": "Correction at equal time",
    "times": "Time",
    "steps": "Decoding steps",
    "plans": "Plans",
}
NOTES = (
    "form: what is added to `softmax scale causal`; kept: share of the visible pairs; recall: share of the softmax weight on kept pairs; "
    "error: of the outputs of single attentions, relative, mean over them",
    "chance: as many blocks of each row at random, the first and the last visible one among them, single keys beside a form of windows, "
    "nothing corrected; window: the last keys, as many pairs",
    "KL: in nats per token with every attention so computed, against the model as it is; mean ± half of the 95 % interval",
    "pages are chosen for each query alone, as in decoding; kept of a corrected form does not count its dense rows",
    "code-lm hardly looks beyond 64 tokens: a window looks good there. recall needs keys from anywhere",
    "correction: sinks and window by TVM's kernels on the rows that the model sends to each attention, with delta, and with the narrowest "
    "window that takes as long as that; error: mean over attentions; times are sums over them",
    "times: q, k, v of one attention of code-lm repeated to the length (6 heads on 2, width 32); medians of runs in turn, choosing "
    "included; beside dense attention by the same kernels; tiles: share of the visible tiles that is visited",
    "steps: graphs of one decoding step with that attention, whose cache comes and goes as tensors and is joined to the new row in each; "
    "quest's page bounds come and go beside it",
    "plans: `optimize` with the passes of sparsify/ alone; bound: of the KL on the half that validates; unseen: on data that it never saw",
    "1 thread",
)


def text_of(found: saved.Rows) -> str:
    parts = ["# Sparse attention\n", "\n".join(f"- {note}" for note in NOTES) + "\n"]
    for name, title in TITLES.items():
        if rows := found.get(name):
            parts += [f"## {title}\n", PARTS[name].table(rows), PARTS[name].goals(rows)]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), action="append")
    parser.add_argument("--quick", action="store_true", help="few samples and short: to see that it runs; nothing is kept")
    parser.add_argument("--resume", action="store_true", help="keep earlier rows, and measure what is missing")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found: saved.Rows = {} if given.quick else saved.read({name: part.ROW for name, part in PARTS.items()})
    for name in given.part or PARTS:
        found[name] = found[name] if given.resume and not given.quick else []
        for row in PARTS[name].rows(given.quick, {x.key for x in found[name] if getattr(x, "whole", True)}):
            print(row, flush=True)
            found[name] = [x for x in found[name] if x.key != row.key] + [row]
            if not given.quick:
                saved.save(found, NOTES, text_of(found))
    print(text_of(found))


if __name__ == "__main__":
    main()
