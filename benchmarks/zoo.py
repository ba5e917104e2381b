"""Every model type of transformers, tiny, with random weights: is each of its attentions found, as what, and is the rewrite exact?

Truth is what the traced ATen graph shows, found without attnopt (zoo/truth.py). Each type runs in a process of its own.

    python benchmarks/zoo.py [--types bert gpt2] [--attention eager sdpa] [--sample] [--jobs 2] [--resume] [--why]

Results go to benchmarks/results/zoo.json and zoo.md when all types were asked for, or with --resume, which goes on where a run was
interrupted, and measures types that are named once more.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import harness
import transformers
from zoo.measure import Record
from zoo.run import append, read, records
from zoo.subject import TYPES
from zoo.table import as_text, faults, markdown, totals, why

SAMPLE = (
    "albert", "bart", "bert", "big_bird", "bloom", "clip", "cohere2", "deberta-v2", "dinov2", "falcon", "gemma2", "gpt2", "gpt_neox",
    "gptj", "llama", "mistral", "mixtral", "opt", "phi3", "qwen3", "resnet", "siglip", "swin", "vit", "xlm-roberta",
)  # fmt: skip
STARTED = harness.RESULTS / "zoo.jsonl"  # what a run has measured so far


def earlier() -> list[Record]:
    """The results of the last whole run, and of one that was interrupted."""
    saved = harness.RESULTS / "zoo.json"
    rows = json.loads(saved.read_text(encoding="utf-8"))["rows"] if saved.exists() else []
    return [*(Record(**row) for row in rows), *read(STARTED)]


def save(found: list[Record]) -> None:
    path = harness.save("zoo", sorted(found, key=lambda r: (r.attention, r.model_type)), totals(found))
    path.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    STARTED.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=TYPES, metavar="TYPE", help="model types; default all")
    parser.add_argument("--attention", nargs="+", default=["eager", "sdpa"], choices=["eager", "sdpa"])
    parser.add_argument("--sample", action="store_true", help="a fixed list that takes a minute and a half, for CI")
    parser.add_argument("--jobs", type=int, default=1, help="types measured at once")
    parser.add_argument("--resume", action="store_true", help="keep earlier results, and add to them")
    parser.add_argument("--why", action="store_true", help="print why attentions were missed")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    kept = {(r.model_type, r.attention): r for r in earlier()} if asked.resume else {}
    kept_results = asked.resume or not (asked.types or asked.sample)
    if kept_results and not asked.resume:
        STARTED.unlink(missing_ok=True)
    named = asked.types or (SAMPLE if asked.sample else None)
    attentions = asked.attention if not asked.sample else ["eager"]
    cases = [(t, a) for t in named or TYPES for a in attentions if named or (t, a) not in kept]
    measured = {}
    for record in records(cases, asked.jobs):
        measured[record.model_type, record.attention] = record
        print(as_text(record), flush=True)
        if kept_results:
            append(STARTED, record)
    found = list((kept | measured).values())
    if kept_results:
        save(found)
    print(*totals(found), sep="\n")
    if asked.why:
        print(*why(found), sep="\n")
    if asked.sample and any(r.error or faults(r) for r in found):
        raise SystemExit("the sample is not wholly recognised")


if __name__ == "__main__":
    main()
