"""Attention on this CPU: TVM's kernels beside torch's SDPA, eager, compiled FlexAttention and onnxruntime, in turn, on fixed threads.

Prefill of 128 to 8,192 tokens (full, causal, window, documents, ALiBi, grouped heads), one query on caches of float32, int8 and int4,
and whether time follows the blocks that windows, documents and lists leave; then which goals are reached. One thread unless it is told
otherwise; on one thread the seconds are those of the process, on several those of the clock. Every result is compared with SDPA's.
Writes benchmarks/results/cpu_attention.md and .json, in less than ten minutes.

    OMP_NUM_THREADS=1 python benchmarks/cpu_attention.py [--threads 1] [--quick] [--anyway] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import harness
import torch
from cpu.cases import decodes, named, prefills
from cpu.contenders import BASELINE, OURS, ready
from cpu.goals import goals
from cpu.row import Row, beside_float32
from cpu.visits import BLOCK, LIMIT, Visit, follow
from gpu.case import Case, flops, make

import attnopt.operators  # noqa: F401  (registers them)
from attnopt.codegen.tvm.availability import missing, version
from attnopt.codegen.tvm.cpu import host
from attnopt.cost.machine import clock
from attnopt.ir.kv_cache import attend_cache
from attnopt.plan.timing.timing import Timing, in_turn

SECONDS, QUICK = 0.6, 0.02  # for each contender of a row
LENGTH, SHORT = 8192, 256  # of the text on which visited blocks are counted
CLOSE = 1e-3  # how far a result may be from SDPA's, absolutely: int4 and int8 are compared with what they hold


def measured(case: Case, seconds: float) -> Row:
    generator = torch.Generator().manual_seed(0)
    data = make(case, torch.device("cpu"), generator, torch.float32)
    calls, reasons = ready(case, data)
    if OURS not in calls:
        sys.exit(f"{named(case)}: {reasons[OURS]}")
    found = calls[OURS]()
    right = calls[BASELINE]() if BASELINE in calls else attend_cache(case.spec, data.q, data.cache).output
    error = float((found - right).abs().max())
    if not error < CLOSE:
        sys.exit(f"{named(case)}: attnopt differs from SDPA by {error:.1e}")
    times: dict[str, Timing] = in_turn(calls, seconds=seconds, clock=clock())
    medians = {name: t.median for name, t in times.items()}
    return Row(named(case), flops(case, data) / 1e9, medians, error, reasons)


def table(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.seconds))
    columns = ["setting", "GFLOP", *(f"{name}, ms" for name in names), "attnopt over sdpa", "over the best peer", "difference"]

    def cells(row: Row) -> Iterator[str]:
        yield row.setting
        yield f"{row.gflop:.3g}"
        for name in names:
            yield f"{row.seconds[name] * 1e3:.3g}" if name in row.seconds else "-"
        for ratio in (row.over(BASELINE), row.over()):
            yield "-" if ratio is None else f"{ratio:.2f}x"
        yield f"{row.error:.0e}"

    return harness.markdown(columns, [list(cells(row)) for row in rows])


def notes_of(rows: Sequence[Row], busy: float) -> list[str]:
    threads = torch.get_num_threads()
    reasons = sorted({f"{name}: {why}" for row in rows for name, why in row.reasons.items()})
    return [
        f"{harness.machine()['processor']}, {threads} thread{'s' * (threads > 1)}, compiled for {host().name}; other processes used "
        f"{busy:.2f} cores when it began",
        "medians of calls in turn; ratios above 1: attnopt is faster",
        LIMIT,
        *(f"not measured, {reason}" for reason in reasons),
    ]


def visits_table(visits: Sequence[Visit]) -> str:
    cells = [[x.name, f"{x.share:.1%}", f"{x.seconds * 1e3:.3g}", f"{x.rate:.2f}"] for x in visits]
    return harness.markdown(
        ["keys of each query", f"visited pairs, of {BLOCK} x {BLOCK} blocks", "ms", "time for a pair over the median"], cells
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="every code path on small shapes, in no useful time")
    parser.add_argument("--anyway", action="store_true", help="also on a loaded machine")
    parser.add_argument("--out", type=Path, help="where to write; default: benchmarks/results, or nowhere with --quick")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if (reason := missing()) is not None:
        sys.exit(reason)
    torch.set_num_threads(given.threads)
    if given.threads == 1 and os.environ.get("OMP_NUM_THREADS") != "1":
        print("OMP_NUM_THREADS is not 1: what FlexAttention compiles may run on more threads", file=sys.stderr)
    busy = harness.busy_share() if given.anyway or given.quick else harness.require_quiet()
    seconds = QUICK if given.quick else SECONDS
    rows: list[Row] = []
    with torch.no_grad():
        started = time.perf_counter()
        cases = [*prefills(given.quick), *decodes(given.quick)]
        for case in cases:
            rows.append(measured(case, seconds))
            spent = time.perf_counter() - started
            print(f"{spent:5.0f} s  {len(rows)} of {len(cases)}  {rows[-1].setting}", file=sys.stderr, flush=True)
        visits = follow(SHORT if given.quick else LENGTH, seconds)
    rows = beside_float32(rows)
    asked = goals(rows, visits)
    notes = notes_of(rows, busy)
    parts = [
        table(rows),
        visits_table(visits),
        "\n".join(f"- {goal}" for goal in asked),
        "\n".join(f"- {note}" for note in notes),
    ]
    text = "\n\n".join(part.strip("\n") for part in parts) + "\n"
    print(text, end="")
    if given.out is not None:
        harness.RESULTS = given.out
    if given.out is not None or not given.quick:
        met = [{"goal": goal.name, "reached": goal.reached, "values": goal.values} for goal in asked]
        extra = {"tvm": version(), "threads": given.threads, "visited": [vars(x) for x in visits], "goals": met}
        path = harness.save("cpu_attention", rows, notes, extra)
        path.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
