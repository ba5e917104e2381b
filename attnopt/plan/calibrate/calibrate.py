"""Measure this machine: its rates, its kernels, and the shares of the rates that they reach; keep it all in a file.

    products of float32, bandwidth of 8 MB, …, sdpa at 1 x 8 x 512 x 64, …   ->   ~/.config/attnopt/cpu-….toml

The list of shapes is fixed (`point_grid`, `linear_points`): a part of it, chosen by hash, so that the rest can judge the fit.
The file is written when all is measured, so that an interrupt leaves what was there before.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.tuning import tune
from attnopt.cost.fit import Sample, fit
from attnopt.cost.machine import clock as machine_clock
from attnopt.cost.machine import with_rates
from attnopt.cost.target import Target, this_machine
from attnopt.cost.target_file import processor, save
from attnopt.ir.spec import parse
from attnopt.plan.calibrate.kernel_points import Point, ready
from attnopt.plan.calibrate.linear_points import LinearPoint, linear_points
from attnopt.plan.calibrate.pace import Pace
from attnopt.plan.calibrate.point_grid import TVM_WIDTH, groups, share
from attnopt.runtime.flex_source import compiler_at_hand

PART = 3  # every third line is measured; the others are left to judge
EACH = 0.02  # seconds for a kernel at a point
TUNED = ("softmax", "softmax causal", "softmax causal & window(256)")  # a line of each family of tiles
RATE = 0.3  # seconds for each rate of the machine
Said = Callable[[str, float], None]  # what is measured now, and which share of the work is done
Clock = Callable[[], float]


def calibrate(
    folder: Path | None = None, *, said: Said = lambda what, done: None, clock: Clock | None = None
) -> tuple[Target, Path]:
    """The measured target and its file, and besides it the tiles of TVM's kernels. Deterministic in what it measures.

    It takes a minute, two with TVM.
    """
    tuned(said)
    target = measured(said=said, clock=clock)
    return target, save(target, folder)


def tuned(said: Said) -> None:
    """The best tile for each way in which a mask cuts the keys, where TVM is installed; first, because points are measured with them."""
    for line in TUNED if missing() is None else ():
        said(f"tiles for {line}", 0.0)
        tune(parse(line), Form(TVM_WIDTH, TVM_WIDTH, "float32"))


def measured(*, said: Said = lambda what, done: None, clock: Clock | None = None) -> Target:
    """The target `cpu` with rates and efficiencies of this machine; nothing is written."""
    clock = clock or machine_clock()
    threads = torch.get_num_threads()
    machine = Target(name="cpu", kind="cpu", description=f"{processor()}, {threads} thread{'s' * (threads > 1)}",
                     source="measured by attnopt calibrate", **{**this_machine(), "units": threads})  # type: ignore[arg-type]  # fmt: skip
    rated = with_rates(machine, seconds=RATE, said=lambda what: said(what, 0.0))
    pace = Pace.found(clock, RATE)
    samples = [*linear_samples(said, pace), *attention_samples(rated, said, pace)]
    said("fitting", 1.0)
    return replace(rated, efficiencies=fit(samples, rated), measured=datetime.date.today().isoformat())


def linear_samples(said: Said, pace: Pace) -> Iterator[Sample]:
    chosen = [p for p in linear_points() if share(f"linear {p.inputs} {p.outputs}", {"rows": p.rows}, PART) == 0]
    for i, (_, group) in enumerate(grouped := by_layer(chosen)):
        said(f"linear layers of {group[0].rows} x {group[0].inputs} x {group[0].outputs}", 0.2 * i / len(grouped))
        times = pace.times({str(p): p.call() for p in group}, EACH)
        yield from (Sample(tuple(p.passes), "float32", times[str(p)]) for p in group)


def by_layer(points: list[LinearPoint]) -> list[tuple[tuple[int, int, int], list[LinearPoint]]]:
    keyed = itertools.groupby(points, key=lambda p: (p.inputs, p.outputs, p.rows))
    return [(key, list(group)) for key, group in keyed]


def attention_samples(target: Target, said: Said, pace: Pace) -> Iterator[Sample]:
    chosen = [g for g in groups(flex=compiler_at_hand()) if share(g[0].spec, g[0].shape, PART) == 0]
    for i, group in enumerate(chosen):
        said(f"{group[0].spec} at {' x '.join(str(size) for _, size in group[0].sizes)}", 0.2 + 0.8 * i / len(chosen))
        for at, seconds in timed(group, pace).items():
            yield Sample(tuple(at.passes(target)), at.dtype, seconds)


def timed(group: list[Point], pace: Pace, failed: Callable[[Point, str], None] = lambda at, why: None) -> dict[Point, float]:
    """Seconds of every kernel of one line at full speed, run in turn."""
    calls = ready(group, failed)
    times = pace.times({str(at): run for at, run in calls.items()}, EACH)
    return {at: times[str(at)] for at in calls}
