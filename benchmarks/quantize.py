"""Fewer bits: what each method loses against the bits that it keeps, beside the quantisers of onnxruntime and torchao.

    python benchmarks/quantize.py --part weights|runtimes|cache|choice|attention|file [--quick] [--resume]

Weights: the reference language model (KL to the float model and perplexity on held-out documents) and MiniLM (1 - cosine of embeddings),
round-to-nearest as the baseline. Runtimes: the same rounding as runtimes run it, with file and time. Choice: what the planner chooses for
the cache of a decoding step. File: the command line on a file, beside onnxruntime's dynamic quantiser. Each part takes a few minutes on
one thread. Results go to benchmarks/results/quantize_<part>.json and .md, row by row; with --resume the rows that stand there are not
measured again.
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

PARTS = ("weights", "runtimes", "cache", "choice", "attention", "file")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default=PARTS[0])
    parser.add_argument("--quick", action="store_true", help="a few samples and methods: to see that it runs; nothing is kept")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of an earlier run, which was cut off, and add to them"
    )
    given = parser.parse_args()
    if not (Path(__file__).parent / "quantize" / f"{given.part}.py").exists():
        parser.error(f"the part '{given.part}' is not there yet")
    importlib.import_module(f"quantize.{given.part}").run(quick=given.quick, resume=given.resume and not given.quick)


if __name__ == "__main__":
    main()
