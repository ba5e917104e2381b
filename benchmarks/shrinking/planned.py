"""What the planner makes of all methods together, beside each kind everywhere, from one search of the reference language model.

A point's loss is the mean on calibration data held back; `nowhere behind` says whether no kind everywhere loses no more and takes less
time than the planner's best plan of at most that loss, by more than the noise of a timing.
"""

from __future__ import annotations

from typing import Any

import attnopt
from shrinking.methods import SHRINKING
from shrinking.rows import Shrunk

LARGEST = 0.3  # KL
NOISE = 0.05  # of the original's time


def plans(subject: Any) -> tuple[list[Shrunk], str]:
    """The planner's points, and a line on whether a single kind is anywhere ahead of them."""
    batches = [dict(b) for b in subject.calibration]
    print("planner: all methods together", flush=True)
    passes = ["fuse-attention", *SHRINKING]
    found = attnopt.explore(
        subject.model, dict(batches[0]), budget=attnopt.Budget(metric="kl", limit=LARGEST), calibration=batches, passes=passes
    )
    planned = [p for p in found.points if p.budget is not None or p.name == "exact"]
    single = [p for p in found.points if p.budget is None and p.name != "exact"]
    whole = next(p for p in found.points if p.name == "exact")
    rows = [
        Shrunk(f"{subject.name}, planned", p.name, p.rewrites, p.loss, 0.0, p.weights / whole.weights, 1.0, p.share, note=p.goal)
        for p in planned
    ]
    ahead = []
    for one in single:
        if one.loss > LARGEST:
            continue
        best = min((p.share for p in planned if p.loss <= one.loss), default=1.0)
        if one.share < best - NOISE:
            ahead.append(f"{one.rewrites} ({one.share:.2f} of the time at a loss of {one.loss:.2e}; the planner {best:.2f})")
    said = "no kind everywhere is ahead of the planner's plans" if not ahead else f"ahead of the planner: {'; '.join(ahead)}"
    return rows, f"{subject.name}, budgets up to KL {LARGEST:g}: {said}. {found.search}"
