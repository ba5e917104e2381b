"""What the planner makes of all methods together, beside each of them alone, under the same budgets."""

from __future__ import annotations

from typing import Any

import torch

import attnopt
from shrinking.methods import SHRINKING
from shrinking.rows import Shrunk

BUDGETS = (0.02, 0.1, 0.3)  # KL


def plans(subject: Any, quick: bool) -> list[Shrunk]:
    """A plan for each budget with all methods, and with each alone; time is what the plan was measured to take."""
    rows = []
    example, batches = dict(subject.calibration[0]), [dict(b) for b in subject.calibration]
    for allowed in BUDGETS[:1] if quick else BUDGETS:
        for name, passes in [("all together", SHRINKING), *((p, (p,)) for p in (() if quick else SHRINKING))]:
            print(f"planner: {name}, KL up to {allowed:g}", flush=True)
            torch.manual_seed(0)
            fast = attnopt.optimize(
                subject.model, example, budget=attnopt.Budget(metric="kl", limit=allowed), calibration=batches,
                passes=["fuse-attention", *passes], effort="low",
            )  # fmt: skip
            report = fast.report
            with torch.no_grad():
                loss, _ = subject.loss(lambda batch, fast=fast: [fast(**batch)])
            time = None
            if report.seconds_before and report.seconds_after:
                time = report.seconds_after / report.seconds_before
            weights = (report.bytes_after or 1.0) / (report.bytes_before or 1.0)
            rows.append(
                Shrunk(f"{subject.name}, planned", name, f"KL up to {allowed:g}", loss.mean, loss.half, weights, 1.0, time,
                       note=f"{len(fast.plan.steps)} steps")
            )  # fmt: skip
    return rows
