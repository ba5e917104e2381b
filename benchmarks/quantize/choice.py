"""The planner among caches: code-lm as the graph of one decoding step, the least memory within a budget on the next token's KL.

For each budget: what was chosen, bytes of a token in the cache, the KL on documents that did not choose (mean, and the one-sided 95 %
bound that the budget holds), and the time of a step of the model as it was optimised, in turn with the original, on torch. Codes of
all widths are read by TVM's decode kernel as they are stored, exact tokens and blocks beside them piece by piece.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from trained_models import code_lm, code_windows

import attnopt
from attnopt.cost.memory import cache_bytes_per_token
from attnopt.patterns import recognise
from attnopt.patterns.block import find_blocks
from attnopt.plan.timing.timing import in_turn
from quantize.decoding import Decoding, past_of

PASSES = ("fuse-attention", "int8-cache", "int4-cache", "int2-cache", "akvq-vl", "zip-cache")
BUDGETS = (1e-3, 1e-2, 1e-1)  # nats
DOCUMENTS, LENGTH, BATCH = 40, 512, 4
LONG = 4096  # tokens of the cache that steps are timed on
COLUMNS = [
    "budget",
    "chosen",
    "bytes a token",
    "of float32",
    "KL",
    "bound",
    "kernel",
    f"step after {LONG} tokens",
    "speed",
    "search",
]


@dataclass(frozen=True)
class Choice:
    """kl, bound: on the documents held back. step: seconds; speed: against the original in turn. search: seconds."""

    budget: float
    chosen: str
    bytes: float
    share: float
    kl: float
    bound: float
    kernel: str
    step: float
    speed: float
    search: float


def inputs_of(model: nn.Module, windows: Tensor) -> dict[str, object]:
    """The step that reads the last token of each window."""
    return {"ids": windows[:, -1:], "past": past_of(model, windows[:, :-1])}


def run(quick: bool, resume: bool = False) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    documents, length, long = (36, 96, 128) if quick else (DOCUMENTS, LENGTH, LONG)
    model, free = code_lm(), torch.export.Dim.DYNAMIC
    step = Decoding(model).eval()
    given = [inputs_of(model, part) for part in code_windows(documents, length).split(BATCH)]
    dims = {"ids": {0: free}, "past": tuple(({0: free, 2: free},) * 2 for _ in given[0]["past"])}  # type: ignore[attr-defined]
    timed = inputs_of(model, code_windows(1, min(long, 4096)).repeat(1, 1))
    found = harness.kept("quantize_choice", Choice) if resume else list[Choice]()
    with tempfile.TemporaryDirectory() as folder:  # what a budget measured, the next one reads
        for budget in [b for b in (BUDGETS[1:2] if quick else BUDGETS) if b not in {x.budget for x in found}]:
            started = time.perf_counter()
            fast = attnopt.optimize(
                step, given[0], calibration=given, budget=attnopt.Budget(metric="kl", limit=budget), passes=PASSES,
                dynamic_shapes=dims, minimise="memory", select="model", effort="medium", cache=folder,
            )  # fmt: skip
            found.append(told(fast, budget, timed, time.perf_counter() - started))
            print(found[-1], flush=True)
            keep(sorted(found, key=lambda x: x.budget), notes(documents, length), quick)
    print(text_of(found, notes(documents, length)))


def notes(documents: int, length: int) -> list[str]:
    return [
        f"{documents} documents of {length} tokens, a step each: one half chooses, the other judges; one thread",
        "bytes a token: of the cache of all layers, scales and zero points counted; what stays exact besides is not",
        f"times: {harness.busy_share():.2f} cores were busy with others at the end",
    ]


def keep(found: list[Choice], said: list[str], quick: bool) -> None:
    """Write what there is so far: each budget takes minutes."""
    if not quick:
        path = harness.save("quantize_choice", found, said)
        path.with_suffix(".md").write_text(text_of(found, said))


def told(fast: attnopt.Optimized, budget: float, timed: dict[str, object], search: float) -> Choice:
    original, made = fast._opened.host, fast._host
    clauses = {name: text for s in fast.plan.steps for name, text in s.cached.items()}
    sites = recognise(original.graph).sites
    pairs = list(zip(sites, find_blocks(original.graph, sites), strict=True))
    before, after = cache_bytes_per_token(pairs), cache_bytes_per_token(pairs, clauses)
    named = original.named_inputs(timed)  # type: ignore[union-attr]
    runs = {"before": (original.runner(), named), "after": (made.runner(), made.adapt(named))}
    times = in_turn({name: (lambda run=run, x=x: run(x)) for name, (run, x) in runs.items()}, seconds=3.0)
    kinds = ", ".join(dict.fromkeys(f"{s.rewrite} {s.kind}" for s in fast.plan.steps)) or "as it is"
    kernels = " and ".join(dict.fromkeys(s.kernel for s in fast.report.sites))
    return Choice(
        budget, kinds, after, after / before, fast.plan.loss or 0.0, fast.plan.bound or 0.0, kernels,
        times["after"].median, 1 / times["after"].ratio(times["before"]), search,
    )  # fmt: skip


def text_of(found: list[Choice], notes: list[str]) -> str:
    rows = [
        [
            f"{x.budget:g}", x.chosen, f"{x.bytes:.0f}", f"{x.share:.2f}", f"{x.kl:.2e}", f"{x.bound:.2e}", x.kernel,
            f"{x.step * 1e3:.2f} ms", f"{x.speed:.2f}x", f"{x.search:.0f} s",
        ]
        for x in found
    ]  # fmt: skip
    parts = ["# The cache that the planner chooses for code-lm\n", "\n".join(f"- {n}" for n in notes) + "\n"]
    return "\n".join([*parts, harness.markdown(COLUMNS, rows)])
