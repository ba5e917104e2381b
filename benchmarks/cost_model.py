"""Predicted against measured time of attention kernels on this machine, and what a plan made from predictions alone is worth.

First this machine is calibrated as `attnopt calibrate` does (a third of the lines, by hash); then every kernel is measured at the
other lines, which the fit has not seen. A line is a spec at a shape; its kernels run in turn, and their median counts. Chosen by
prediction alone means: of the kernels of one runtime at one line, the one with the least predicted time.

    OMP_NUM_THREADS=1 python benchmarks/cost_model.py [--anyway] [--limit 400]
    python benchmarks/cost_model.py --target h200 [--seconds 300]      on that GPU: Triton kernels beside torch's, as `cost_model_gpu` does

`benchmarks/ship_efficiencies.py` makes shipped defaults of a calibration.

On one thread the seconds are those of the process (what others do on the machine is not counted), on several those of the clock; both
are counted beside a product that is timed in turn with each line, because a shared processor is slower for seconds at a time (`pace`).
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import harness
import torch
from scipy.stats import kendalltau

from attnopt.codegen import LOWERINGS
from attnopt.cost.estimate import estimate
from attnopt.cost.machine import clock
from attnopt.cost.target import Target
from attnopt.plan.calibrate.calibrate import PART, measured, timed
from attnopt.plan.calibrate.kernel_points import KERNELS, Point
from attnopt.plan.calibrate.pace import Pace
from attnopt.plan.calibrate.point_grid import groups, share
from attnopt.runtime.flex_source import compiler_at_hand

TAU, ERROR, REGRET = 0.9, 0.2, 0.05  # what is asked of the model
FEWEST, CASES = 200, 20  # points, and lines with a choice
HOSTS = {x.name: x.host for x in (*LOWERINGS, *KERNELS.values())}


@dataclass(frozen=True)
class Judged:
    """One kernel at one line, in seconds."""

    spec: str
    shape: str
    kernel: str
    predicted: float
    measured: float
    bound: str

    @property
    def error(self) -> float:
        return abs(self.predicted / self.measured - 1.0)

    @property
    def case(self) -> tuple[str, str, str]:
        """The kernels among which a plan chooses: one line on one runtime."""
        return self.spec, self.shape, HOSTS[self.kernel]


@dataclass(frozen=True)
class Regret:
    """What the choice by prediction costs at one line, against the best of all that were measured."""

    case: tuple[str, str, str]
    chosen: str
    best: str
    ratio: float


def judge(target: Target, limit: int, notes: list[str]) -> list[Judged]:
    """Every kernel at the lines that the calibration left out, up to a number of points."""
    rest = [g for g in groups(flex=compiler_at_hand()) if share(g[0].spec, g[0].shape, PART) != 0]
    rows: list[Judged] = []
    pace = Pace.found(clock())
    for i, group in enumerate(rest):
        for at, seconds in timed(group, pace, lambda p, why: notes.append(f"{p}: {why[:120]}")).items():
            rows.append(judged(at, seconds, target))
        print(f"\r{i + 1} of {len(rest)} lines, {len(rows)} points", end="", file=sys.stderr, flush=True)
        if len(rows) >= limit:
            break
    return rows


def judged(at: Point, seconds: float, target: Target) -> Judged:
    made = estimate(at.spec, at.shape, at.dtype, at.kernel, target=target)
    return Judged(at.spec, " ".join(f"{axis}={size}" for axis, size in at.sizes), at.kernel, made.seconds, seconds, made.bound)


def regrets(rows: Sequence[Judged]) -> list[Regret]:
    found = []
    for case, group in itertools.groupby(sorted(rows, key=lambda r: r.case), key=lambda r: r.case):
        held = list(group)
        if len(held) > 1:
            chosen, best = min(held, key=lambda r: r.predicted), min(held, key=lambda r: r.measured)
            found.append(Regret(case, chosen.kernel, best.kernel, chosen.measured / best.measured))
    return found


def summary(rows: Sequence[Judged], choices: Sequence[Regret]) -> tuple[list[list[str]], dict[str, float]]:
    """A row of the table for each kernel and for all, and the numbers that are asked for."""

    def line(name: str, held: Sequence[Judged]) -> list[str]:
        errors = sorted(r.error for r in held)
        tau = kendalltau([r.predicted for r in held], [r.measured for r in held]).statistic
        return [
            name,
            str(len(held)),
            f"{tau:.3f}",
            f"{statistics.median(errors):.1%}",
            f"{errors[int(0.9 * (len(errors) - 1))]:.1%}",
        ]

    kernels = sorted({r.kernel for r in rows})
    table = [line(kernel, [r for r in rows if r.kernel == kernel]) for kernel in kernels]
    ratios = [r.ratio for r in choices]
    numbers = {
        "points": len(rows), "tau": float(kendalltau([r.predicted for r in rows], [r.measured for r in rows]).statistic),
        "median_error": statistics.median(r.error for r in rows), "cases": len(choices),
        "within_5_percent": sum(r <= 1 + REGRET for r in ratios) / len(ratios),
        "whole_plan": sum(r.ratio * s for r, s in zip(choices, bests(rows, choices), strict=True)) / sum(bests(rows, choices)),
        "worst": max(ratios),
    }  # fmt: skip
    return [*table, line("all", rows)], numbers


def bests(rows: Sequence[Judged], choices: Sequence[Regret]) -> list[float]:
    """The least measured seconds of each case."""
    return [min(r.measured for r in rows if r.case == c.case) for c in choices]


def verdict(numbers: Mapping[str, float]) -> list[str]:
    """What is said of the numbers of `summary`, in the words of what is asked."""
    return [
        f"Kendall's tau {numbers['tau']:.3f} (asked: {TAU}), median error {numbers['median_error']:.1%} (asked: {ERROR:.0%})",
        f"chosen by prediction alone: {numbers['within_5_percent']:.1%} of {numbers['cases']} choices are within 5 % of the best measured,"
        f" all of them together take {numbers['whole_plan'] - 1:.1%} longer than the best, the worst {numbers['worst']:.2f}x",
    ]


def missed(choices: Sequence[Regret]) -> str:
    """A table of the choices that are far behind the best."""
    worse = sorted((c for c in choices if c.ratio > 1 + REGRET), key=lambda c: -c.ratio)
    cells = [[*c.case, c.chosen, c.best, f"{c.ratio:.2f}x"] for c in worse]
    return harness.markdown(["spec", "shape", "runtime", "chosen", "best", "time"], cells)


def failing(numbers: Mapping[str, float]) -> str:
    """What the model misses; empty where it holds."""
    if numbers["points"] < FEWEST or numbers["cases"] < CASES:
        return f"too few points ({numbers['points']}) or choices ({numbers['cases']}) to judge"
    wrong = numbers["tau"] < TAU or numbers["median_error"] > ERROR or numbers["whole_plan"] > 1 + REGRET
    return "the model misses what is asked of it" if wrong else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--anyway", action="store_true", help="measure on a loaded machine; the table says how loaded it was")
    parser.add_argument("--limit", type=int, default=10**6, help="points to judge at most")
    parser.add_argument("--target", default="cpu", help="a GPU that is here, or cpu")
    parser.add_argument("--seconds", type=float, default=300.0, help="on a GPU: after which no further case is begun")
    given = parser.parse_args()
    if given.target != "cpu":
        from cost_model_gpu import run

        run(given.target, given.seconds)
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    busy = min(harness.busy_share() for _ in range(3)) if given.anyway else harness.require_quiet()
    threads, notes, started = torch.get_num_threads(), [], time.perf_counter()
    target = measured(said=lambda what, done: print(f"\r{done:4.0%} {what:90.90}", end="", file=sys.stderr, flush=True))
    calibrated = time.perf_counter()
    rows = judge(target, given.limit, notes)
    print(file=sys.stderr)
    choices = regrets(rows)
    table, numbers = summary(rows, choices)
    kind = "of the process (on one thread; what others run is not counted)" if threads == 1 else "of the clock"
    said = [
        f"{numbers['points']} points on {threads} thread{'s' * (threads > 1)}, none of them seen by the fit; seconds {kind}",
        f"calibrated in {(calibrated - started) / 60:.1f} minutes, measured in {(time.perf_counter() - calibrated) / 60:.1f}",
        f"other processes used {busy:.2f} cores when it began, load average {os.getloadavg()[0]:.1f} when it ended",
        *verdict(numbers),
        *notes,
    ]
    text = harness.markdown(["kernel", "points", "Kendall's tau", "median error", "error of 9 in 10"], table)
    print(text, *said, sep="\n")
    extra = {"summary": numbers, "efficiencies": {name: vars(e) for name, e in target.efficiencies.items()}, "peak": target.peak}
    path = harness.save("cost_model", rows, said, extra)
    lines = "\n".join(f"- {n}" for n in said)
    path.with_suffix(".md").write_text(
        f"{text}\n{lines}\n\nChoices that were more than 5 % behind the best:\n\n{missed(choices)}"
    )
    if reason := failing(numbers):
        sys.exit(reason)


if __name__ == "__main__":
    main()
