"""The promise of a budget, on documents that the planner never saw, and its plans beside the choices that one makes by hand.

The trained language model of examples/models, exported to ONNX: `attnopt.explore` sweeps the budget on 34 documents (17 to choose by,
17 to validate). Each plan is written to a file, applied again to the exported model, and measured on 28 other documents: its loss there,
and its time as a share of the original's. Beside it the same choice for all layers: int8, one window, no attention in the last layers or
in those of least Gate-Norm, and these together. All models run in turn.

    OMP_NUM_THREADS=1 python benchmarks/budget.py [--anyway] [--effort low]

On one thread the seconds are those of the process (what others do on the machine is not counted), on several those of the clock.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import harness
import numpy as np
import torch
from budget_judged import Compared, Measured, compared, interval
from torch import Tensor, nn

import attnopt
from attnopt.analysis.calibration import Calibration
from attnopt.cost.machine import clock
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Host, Refusal, Runner
from attnopt.passes import GateNorm
from attnopt.plan.budget import Budget
from attnopt.plan.groups import Grouping
from attnopt.plan.judge import Judge
from attnopt.plan.proposals import Move
from attnopt.plan.quality import Loss
from attnopt.plan.replay import step_of
from attnopt.plan.timing import in_turn
from attnopt.report.frontier import Frontier
from attnopt.report.plan import Plan, PlanStep

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from trained_models import code_lm, code_windows

LENGTH, SEEN, UNSEEN = 512, 34, 28  # tokens of a document; documents
LARGEST = 0.1
TOGETHER = ("sinks 4 window 256", "sinks 4 window 128", "sinks 4 window 64")  # windows that int8 is also combined with
ROUNDS = 24  # runs of each model
PASSES = ("fuse-attention", "dynamic-int8", "gate-norm", "drop-attention", "sinks-window")
ORIGINAL = "original"


class Logits(nn.Module):
    """Token ids [batch, length] -> logits [batch, length, vocabulary]."""

    def __init__(self) -> None:
        super().__init__()
        self.model = code_lm("eager")

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def export(path: Path) -> Path:
    """torch's own export, batch and length open."""
    example, dim = {"input_ids": code_windows(2, LENGTH)}, torch.export.Dim.DYNAMIC
    with torch.no_grad():
        torch.onnx.export(
            Logits().eval(), (), path, kwargs=example, dynamo=True, dynamic_shapes={"input_ids": {0: dim, 1: dim}},
            external_data=False, verbose=False, output_names=["logits"],
        )  # fmt: skip
    return path


def documents(seed: int = 0) -> tuple[Tensor, Tensor]:
    """(those that the planner sees, the others), the beginning of one document each."""
    windows = code_windows(SEEN + UNSEEN, LENGTH)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:SEEN]], windows[order[SEEN:]]


def budget_plans(frontier: Frontier) -> dict[str, Plan]:
    """The plan of each budget, least time; budget 0 is the exact plan."""
    exact = next(p for p in frontier.points if p.name == "exact")
    held = sorted((p for p in frontier.points if p.goal == "time"), key=lambda p: p.budget or 0.0)
    return {"budget 0": exact.plan} | {f"budget {p.budget:g}": p.plan for p in held}


def uniform_plans(frontier: Frontier, host: OnnxHost) -> dict[str, Plan]:
    """What one does by hand, each with the kernels of the exact plan: every kind everywhere, the last layers, and some together."""
    exact = next(p for p in frontier.points if p.name == "exact").plan
    kinds = {p.name.removesuffix(" everywhere"): p.plan.steps for p in frontier.points if p.name.endswith(" everywhere")}
    int8, pruned = kinds["dynamic-int8: int8"], {"gate-norm: 1 of 8": kinds["gate-norm: 1 of 8"], **last_layers(host)}
    steps = {**kinds, **pruned}
    windows = {name: kinds[f"sinks-window: {name}"] for name in TOGETHER}
    steps |= {f"int8 and {name}": (*int8, *own) for name, own in windows.items()}
    steps |= {f"int8 and {name}": without((*int8, *own), own) for name, own in pruned.items() if "1 of" in name}
    steps |= {f"{a} and {b}": without((*windows[a], *own), own) for a in TOGETHER[1:] for b, own in pruned.items() if "1 of" in b}
    return {name: replace(exact, steps=tuple(own)) for name, own in steps.items()}


def last_layers(host: OnnxHost) -> dict[str, tuple[PlanStep, ...]]:
    """Without the attention of the last one, two, three layers."""
    (group,), rewrite = Grouping(host).of("model"), GateNorm()
    decisions = rewrite.ranked(group)
    assert not isinstance(decisions, Refusal), decisions
    order = {s.name: i for i, s in enumerate(group.sites)}
    members = sorted((s for _, sublayers in decisions for s in sublayers), key=lambda s: order[s.site.name])
    found = {}
    for count in (1, 2, 3):
        candidate = rewrite.candidate(members[-count:], len(order), 0.0)
        found[f"without attention, the last {count} of {len(order)}"] = (step_of(Move(rewrite, group, candidate)),)
    return found


def without(steps: Sequence[PlanStep], pruned: Sequence[PlanStep]) -> tuple[PlanStep, ...]:
    """The steps without those that change what is removed."""
    gone = {n for s in pruned for n in s.removes}
    sites = {name for s in pruned for name in s.options["sites"]}
    return tuple(s for s in steps if s in pruned or not (gone & set(s.nodes) or s.group in sites))


def applied(model: Path, example: Mapping[str, Tensor], plans: Mapping[str, Plan], folder: Path) -> dict[str, Host]:
    """The models after the plans, each read back from a file as a user would."""
    made: dict[str, Host] = {}
    for name, plan in plans.items():
        path = folder / "plan.json"
        path.write_text(json.dumps(plan.to_json()))
        result = folder / "result.onnx"
        attnopt.optimize(model, example, plan=path, select="model").export(result)
        made[name] = OnnxHost.from_model(result)
        print(f"\r{len(made)} of {len(plans)} plans applied", end="", file=sys.stderr, flush=True)
    return made


@dataclass(frozen=True)
class Contender:
    """One model on the unseen documents. runs: seconds of each round."""

    loss: Loss
    runs: tuple[float, ...]


def raced(host: OnnxHost, hosts: Mapping[str, Host], unseen: Tensor) -> dict[str, Contender]:
    """Losses on every document, then all models in turn on the first."""
    data = Calibration.of(host.graph, [{"input_ids": d[None]} for d in unseen])
    judge = Judge(host, data, Budget("kl", LARGEST), names=tuple(host.output_names))
    losses = {}
    for name, other in hosts.items():
        losses[name] = judge.loss(other)
        print(f"\r{len(losses)} of {len(hosts)} losses measured", end="", file=sys.stderr, flush=True)
    runners: dict[str, Runner] = {ORIGINAL: host.runner()} | {name: other.runner() for name, other in hosts.items()}
    first = data.batches[0]
    calls = {name: (lambda run=run: run(first)) for name, run in runners.items()}
    times = in_turn(calls, seconds=60.0, least=ROUNDS, most=ROUNDS, clock=clock())
    nothing = Loss(judge.metric.name, 0.0, 0.0, len(unseen), (0.0,) * len(unseen))
    return {name: Contender(losses.get(name, nothing), times[name].runs) for name in calls}


def measured(name: str, plan: Plan, budget: float | None, all_of: Mapping[str, Contender]) -> Measured:
    own, original = all_of[name], all_of[ORIGINAL]
    ratios = np.divide(own.runs, original.runs)
    low, high = interval(own.loss.values, np.mean)
    fastest, slowest = interval(ratios, np.median)
    counts: dict[str, int] = {}
    for s in plan.steps:
        counts[f"{s.rewrite}: {s.kind}"] = counts.get(f"{s.rewrite}: {s.kind}", 0) + 1
    return Measured(
        name, budget, own.loss.mean, low, high, own.loss.upper, plan.bound if budget is not None else None,
        float(np.median(ratios)), fastest, slowest, float(np.median(own.runs)),
        ", ".join(f"{kind} ({n})" for kind, n in counts.items()) or "none", tuple(own.loss.values), tuple(own.runs),
    )  # fmt: skip


def held(m: Measured) -> str:
    """Whether a plan lost no more than its budget; an exact one differs by rounding."""
    return "exact" if m.rewrites == "none" else "yes" if m.loss <= (m.budget or 0.0) else "**no**"


def tables(budgets: Sequence[Measured], uniform: Sequence[Measured], verdicts: Sequence[Compared]) -> str:
    promise = [
        [
            f"{m.budget:g}", "" if m.promised is None else f"{m.promised:.2e}", f"{m.loss:.2e} ({m.low:.2e} to {m.high:.2e})",
            held(m), f"{m.share:.3f} ({m.fastest:.3f} to {m.slowest:.3f})", m.rewrites,
        ]
        for m in budgets
    ]  # fmt: skip
    by_hand = [
        [
            u.name,
            f"{u.loss:.2e} ({u.low:.2e} to {u.high:.2e})",
            f"{u.share:.3f}",
            c.plan,
            f"{c.loss:.2e}",
            f"{c.share:.3f}",
            c.verdict,
        ]
        for u, c in zip(uniform, verdicts, strict=True)
    ]
    first = harness.markdown(["budget", "bound when chosen", "loss on unseen documents", "holds", "time", "rewrites"], promise)
    head = ["for all layers alike", "its loss", "its time", "planner, at no more loss", "loss", "time", "planner behind?"]
    return f"{first}\n{harness.markdown(head, by_hand)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--anyway", action="store_true", help="measure on a loaded machine; the table says how loaded it was")
    parser.add_argument("--effort", default="low")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    busy = min(harness.busy_share() for _ in range(3)) if given.anyway else harness.require_quiet()
    seen, unseen = documents()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, example = export(folder / "code-lm.onnx"), {"input_ids": seen[:1]}
        frontier = attnopt.explore(
            path, example, calibration=[{"input_ids": d[None]} for d in seen], budget=LARGEST, effort=given.effort, passes=PASSES
        )
        print(frontier)
        host = OnnxHost.from_model(path)
        plans, others = budget_plans(frontier), uniform_plans(frontier, host)
        hosts = applied(path, example, {**plans, **others}, folder)
        contenders = raced(host, hosts, unseen)
    print(file=sys.stderr)
    budgets = [measured(n, p, p.budget, contenders) for n, p in plans.items()]
    uniform = [measured(n, p, None, contenders) for n, p in others.items()]
    verdicts = [compared(u, budgets) for u in uniform]
    text = tables(budgets, uniform, verdicts)
    threads = torch.get_num_threads()
    kind = "of the process (what others run is not counted)" if threads == 1 else "of the clock"
    notes = [
        f"code-lm, {LENGTH} tokens, onnxruntime, {threads} thread{'s' * (threads > 1)}, seconds {kind}; explore at effort {given.effort} "
        f"on {SEEN} documents, losses (mean KL in nats, 95 % intervals) on {UNSEEN} others",
        f"time: median share of the original's time ({contenders[ORIGINAL].runs and np.median(contenders[ORIGINAL].runs) * 1e3:.1f} ms), "
        f"all {len(contenders)} models in turn, {ROUNDS} rounds",
        "behind: every plan of the planner that loses no more (or not surely more) is more than 3 % slower",
        f"other processes used {busy:.2f} cores when it began, load average {os.getloadavg()[0]:.1f} when it ended",
        frontier.search,
        *frontier.notes,
        *(f"{p.name}: {p.note}" for p in frontier.points if p.note and p.goal == "time"),
    ]
    print(text, *notes, sep="\n")
    extra = {"uniform": [vars(u) for u in uniform], "verdicts": [vars(c) for c in verdicts]}
    saved = harness.save("budget", budgets, notes, extra)
    saved.with_suffix(".md").write_text(text + "\n" + "\n".join(f"- {n}" for n in notes) + "\n")
    if broken := [m.name for m in budgets if m.loss > (m.budget or 0.0) and m.rewrites != "none"]:
        sys.exit(f"lost more than was promised: {', '.join(broken)}")
    if ahead := [u.name for u, c in zip(uniform, verdicts, strict=True) if c.behind]:
        sys.exit(f"ahead of the planner: {', '.join(ahead)}")


if __name__ == "__main__":
    main()
