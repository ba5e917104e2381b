"""Attention on this CPU: TVM's kernels beside torch's SDPA, eager, compiled FlexAttention and onnxruntime, in turn, on fixed threads.

Prefill of 128 to 8,192 tokens (full, causal, window, documents, ALiBi, grouped heads), one query on caches of float32, int8 and int4,
and whether time follows the blocks that a window leaves. One thread unless it is told otherwise; on one thread the seconds are those
of the process, on several those of the clock. Every result is compared with SDPA's.

    OMP_NUM_THREADS=1 python benchmarks/cpu_attention.py [--threads 1] [--quick] [--anyway] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import harness
import torch
from cpu.cases import decodes, named, prefills, windows
from cpu.contenders import BASELINE, OURS, ready
from gpu.case import Case, flops, make

import attnopt.operators  # noqa: F401  (registers them)
from attnopt.codegen.tvm.availability import missing, version
from attnopt.codegen.tvm.cpu import host
from attnopt.cost.machine import clock
from attnopt.ir.kv_cache import attend_cache
from attnopt.ir.spec import parse
from attnopt.ir.visits import visited_pairs
from attnopt.plan.timing.timing import Timing, in_turn

SECONDS, QUICK = 1.0, 0.02  # for each contender of a row
BLOCK = 64  # rows and keys of the blocks that are counted
CLOSE = 1e-3  # how far a result may be from SDPA's, absolutely: int4 and int8 are compared with what they hold


@dataclass(frozen=True)
class Row:
    """Median seconds of each contender in one setting; error: of ours, the largest difference; reasons: of those that are absent."""

    setting: str
    gflop: float
    seconds: dict[str, float]
    error: float
    reasons: dict[str, str] = field(default_factory=dict)

    def over(self, *names: str) -> float | None:
        """How many times as fast as the best of those, or of all others."""
        others = [s for name, s in self.seconds.items() if not name.startswith(OURS) and (not names or name in names)]
        return min(others) / self.seconds[OURS] if others and OURS in self.seconds else None


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


def proportional(quick: bool, seconds: float) -> list[tuple[str, float, float]]:
    """For each window: its name, seconds of ours, and seconds for a visited pair over the median of all."""
    found = []
    for case in windows(quick):
        data = make(case, torch.device("cpu"), torch.Generator().manual_seed(0), torch.float32)
        calls, _ = ready(case, data)
        spent = in_turn({OURS: calls[OURS]}, seconds=seconds, clock=clock())[OURS].median
        pairs = visited_pairs(parse(case.spec).mask, case.q_len, case.kv_len, 0, BLOCK, BLOCK)
        found.append((named(case), spent, spent / pairs))
    middle = statistics.median(rate for _, _, rate in found)
    return [(name, spent, rate / middle) for name, spent, rate in found]


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


def beside_float32(rows: Sequence[Row]) -> list[Row]:
    """Packed caches beside the peers on a cache of float32 of the same size."""
    plain = {row.setting.replace("float32", "*"): row for row in rows if " float32 " in row.setting}
    made = []
    for row in rows:
        twin = plain.get(row.setting.replace(" int8 ", " * ").replace(" int4 ", " * "))
        if twin is not None and twin is not row:
            others = {f"{name} float32" if name == OURS else name: s for name, s in twin.seconds.items()}
            made.append(replace(row, seconds=others | row.seconds))
        else:
            made.append(row)
    return made


def notes_of(rows: Sequence[Row], follow: Sequence[tuple[str, float, float]], busy: float) -> list[str]:
    threads = torch.get_num_threads()
    reasons = sorted({f"{name}: {why}" for row in rows for name, why in row.reasons.items()})
    spread = max(abs(rate - 1) for _, _, rate in follow)
    return [
        f"{harness.machine()['processor']}, {threads} thread{'s' * (threads > 1)}, compiled for {host().name}; other processes used "
        f"{busy:.2f} cores when it began",
        "medians of calls in turn; ratios above 1: attnopt is faster",
        f"time for a visited pair of {BLOCK} x {BLOCK} blocks lies within {spread:.0%} of its median over these windows: "
        + ", ".join(f"{name} {spent * 1e3:.3g} ms ({rate:.2f})" for name, spent, rate in follow),
        *(f"not measured, {reason}" for reason in reasons),
    ]


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
        for case in (*prefills(given.quick), *decodes(given.quick)):
            rows.append(measured(case, seconds))
            print(f"\r{len(rows)} rows, {rows[-1].setting:40}", end="", file=sys.stderr, flush=True)
        follow = proportional(given.quick, seconds)
    print(file=sys.stderr)
    rows = beside_float32(rows)
    notes = notes_of(rows, follow, busy)
    print(table(rows), *notes, sep="\n")
    if given.out is not None:
        harness.RESULTS = given.out
    if given.out is not None or not given.quick:
        extra = {"tvm": version(), "threads": given.threads, "visited": [list(x) for x in follow]}
        path = harness.save("cpu_attention", rows, notes, extra)
        path.with_suffix(".md").write_text(table(rows) + "\n" + "\n".join(f"- {n}" for n in notes) + "\n")


if __name__ == "__main__":
    main()
