"""What the planner makes of all methods together, beside each kind everywhere, from one search of a trained model.

Every plan of a search is a row, applied to torch and to its export and judged as single methods are. There are two searches: of rewrites
as they are, and of these beside their twins that are tuned lightly (`tune=True`), whose rows have a word of their own before them. By the
search's own numbers (loss on calibration data held back, its clock) a line says whether the frontier is anywhere behind a single kind:
whether one kind everywhere loses no more and takes less time than the planner's best plan of at most that loss, by more than the noise of
a timing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import attnopt
from attnopt.cost.target import load_target
from attnopt.ir.site import Host
from attnopt.plan.options.workshop import Workshop
from attnopt.plan.replay import moves_from, transferred
from attnopt.report.frontier import Frontier, Point
from attnopt.report.plan import PlanStep
from shrinking.kept import Kept
from shrinking.methods import SHRINKING, Applied, sized
from shrinking.rows import Shrunk
from shrinking.timing import onnx_of, ratio

LARGEST = {"code-lm": ("kl", 0.3), "minilm": ("cosine", 0.05)}
NOISE = 0.05  # of the original's time


@dataclass(frozen=True)
class Kind:
    """One way to search. word: stands before what each of its rows takes; topic: of what is said of it, by which a run goes on."""

    word: str
    topic: str
    tune: bool = False


KINDS = (Kind("planned", "planner"), Kind("tuned plan", "planner, tuned", tune=True))


def searched(subject: Any, kind: Kind, kept: Kept) -> None:
    """The rows of one search and what they say; nothing where they are there. One that was interrupted starts anew."""
    topic = f"{subject.name}, {kind.topic}"
    if topic in kept.said:
        return
    found = explored(subject, kind)
    kept.rows = [r for r in kept.rows if r.model != subject.name or not r.method.startswith(f"{kind.word}: ")]
    kept.add(planned_rows(subject, found, kind))
    kept.say(topic, lambda: [ahead(subject, found, kind)])


def explored(subject: Any, kind: Kind) -> Frontier:
    print(f"{subject.name}, {kind.topic}: all methods together", flush=True)
    batches = [dict(b) for b in subject.calibration]
    metric, limit = LARGEST[subject.name]
    passes = ["fuse-attention", *SHRINKING]
    budget = attnopt.Budget(metric=metric, limit=limit)
    return attnopt.explore(subject.model, dict(batches[0]), budget=budget, calibration=batches, passes=passes, tune=kind.tune)


def parted(found: Frontier) -> tuple[list[Point], list[Point]]:
    """(plans of the planner, each kind of rewrite everywhere)."""
    planned = [p for p in found.points if p.budget is not None or p.name == "exact"]
    return planned, [p for p in found.points if p.budget is None and p.name != "exact"]


def planned_rows(subject: Any, found: Frontier, kind: Kind) -> Iterator[Shrunk]:
    """Each distinct plan, by the names of all budgets that it is the best for."""
    names: dict[str, list[Point]] = {}
    for point in parted(found)[0]:
        names.setdefault(json.dumps(point.plan.to_json()["steps"], sort_keys=True), []).append(point)
    exported, inputs = onnx_of(subject.torch), dict(subject.judged[0])
    for points in names.values():
        steps = points[0].plan.steps
        if not steps:
            continue
        print(f"{subject.name}, {kind.word}: {points[0].name}", flush=True)
        made = replayed(subject.torch, steps)
        twin = replayed(exported, transferred(steps, subject.torch, exported)).host
        loss, _ = subject.loss(made.host.runner())
        yield Shrunk(
            subject.name,
            f"{kind.word}: {points[0].rewrites}",
            "; ".join(p.name for p in points),
            loss.mean,
            loss.half,
            made.weights,
            made.cache,
            ratio(subject.torch, made.host, inputs, 1.0),
            ratio(exported, twin, inputs, 1.0),
            f"with its kernels {points[0].share:.2f} of the time by the search's clock",
            made.parameters,
            made.cache_bytes,
        )


def replayed(host: Host, steps: Sequence[PlanStep]) -> Applied:
    shop = Workshop(host, {}, load_target("cpu")[0], "torch" if host.kind == "torch" else "onnxruntime", 0, {})
    made = shop.edited(host.copy(), moves_from(steps, host), {})
    removed = {name for step in steps for name in step.options.get("sites", ())}
    return sized(host, made, removed, {node: held for step in steps for node, held in step.arrays.items()})


def ahead(subject: Any, found: Frontier, kind: Kind) -> str:
    """Whether a single kind is anywhere ahead of the planner's plans."""
    planned, single = parted(found)
    limit, better = LARGEST[subject.name][1], []
    for one in single:
        best = min((p.share for p in planned if p.loss <= one.loss), default=1.0)
        if one.loss <= limit and one.share < best - NOISE:
            better.append(f"{one.rewrites} ({one.share:.2f} of the time at a loss of {one.loss:.2e}; the planner {best:.2f})")
    said = "no kind everywhere is ahead of the planner's plans" if not better else f"ahead of the planner: {'; '.join(better)}"
    what = ", tuned" * kind.tune
    return f"{subject.name}{what}, budgets up to {found.metric} {limit:g}: {said}. {found.search}"
