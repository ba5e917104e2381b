"""What the planner chooses among the passes of sparsify/ under a budget of 0.01: within it on the half that validates, and elsewhere?

optimize(model, calibration=…, budget=0.01, passes=…, seed=0, 1, …)   ->   bound of the KL, KL on unseen data, share of the time
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import trained_models
from quantize.subjects import Measured
from recall_task import recall_batch

import attnopt
from attnopt.plan.timing.timing import counted, in_turn
from sparsifying.losses import Logits

BUDGET, SEEDS = 0.01, (0, 1, 2)
SEEN, UNSEEN = 32, 16  # samples
PASSES = (
    "fuse-attention", "sinks-window", "head-windows", "delta-attention", "sparge-attn", "moba", "block-topk", "power-attention",
    "big-bird", "dilated-window", "neighborhood",
)  # fmt: skip
COLUMNS = ["model", "length", "seed", "bound", "KL unseen", "of the time", "rewrites"]


@dataclass(frozen=True)
class Planned:
    """One plan. bound: one-sided 95 % of the KL on the half that validates, None where the plan is exact; share of the original's time."""

    model: str
    length: int
    seed: int
    bound: float | None
    kl: float
    kl_half: float
    share: float
    rewrites: str
    part: str = "plans"

    @property
    def key(self) -> tuple[str, int, int]:
        return (self.model, self.length, self.seed)


ROW = Planned


def subjects(quick: bool) -> Iterator[tuple[str, int, Callable[[], nn.Module], Callable[[int], Tensor]]]:
    """Name, length, model, and a function from a count to as many samples."""
    length = 256 if quick else 1024
    yield "code-lm", length, trained_models.code_lm, lambda n: trained_models.code_windows(n, length)
    yield "recall", length, trained_models.recall_model, lambda n: recall_batch(n, 32, length, 0).tokens


@torch.no_grad()
def rows(quick: bool, done: Collection[object]) -> Iterator[Planned]:
    seen, unseen = SEEN, 2 if quick else UNSEEN
    for name, length, make, samples in subjects(quick):
        for seed in SEEDS[:1] if quick else SEEDS:
            if (name, length, seed) in done:
                continue
            data = samples(seen + unseen)
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
            yield planned(name, length, seed, Logits(make()).eval(), data[order[:seen]], data[order[seen:]])


def planned(name: str, length: int, seed: int, model: nn.Module, seen: Tensor, unseen: Tensor) -> Planned:
    inputs = {"input_ids": seen[:1]}
    made = attnopt.optimize(
        model, inputs, calibration=[{"input_ids": x[None]} for x in seen], budget=BUDGET, passes=PASSES, seed=seed
    )
    lost = []
    for x in unseen:
        p, q = (run(input_ids=x[None]).log_softmax(-1) for run in (model, made))
        lost.append((p.exp() * (p - q)).sum(-1).mean())
    kl = Measured.of(torch.stack(lost))
    calls = {"original": lambda: model(**inputs), "made": lambda: made(**inputs)}
    times = in_turn(calls, seconds=4.0, clock=counted())
    counts: dict[str, int] = {}
    for step in made.plan.steps:
        counts[f"{step.rewrite}: {step.kind}"] = counts.get(f"{step.rewrite}: {step.kind}", 0) + 1
    rewrites = ", ".join(f"{kind} ({n})" for kind, n in counts.items()) or "none"
    return Planned(name, length, seed, made.plan.bound, kl.mean, kl.half, times["made"].ratio(times["original"]), rewrites)


def table(found: list[Planned]) -> str:
    cells = [
        [x.model, str(x.length), str(x.seed), "" if x.bound is None else f"{x.bound:.2e}", str(Measured(x.kl, x.kl_half)),
         f"{x.share:.2f}", x.rewrites]
        for x in found
    ]  # fmt: skip
    return harness.markdown(COLUMNS, cells)


def goals(found: list[Planned]) -> str:
    over = [x for x in found if (x.bound or 0.0) > BUDGET]
    beyond = [x for x in found if x.kl > BUDGET]
    return (
        f"- {len(found)} plans at a budget of {BUDGET}: {len(over)} validated over it, {len(beyond)} lost more than it on data that they "
        f"never saw\n"
    )
