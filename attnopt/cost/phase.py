"""A phase: one pass of a kernel, priced by the roofline.

    compute = flops / (peak * products) + operations / (float32 peak * scores)
    move    = bytes / (bandwidth of the working set * memory) + rereads / (bandwidth of theirs * memory)
    seconds = launches * launch + waves * (the longer + what of the shorter does not hide behind it)

    waves   = ceil(tasks / units) * units / tasks         133 tiles on 132 units take as long as 264

Source: "Roofline: An Insightful Visual Performance Model" (Williams et al.), with a second roof for operations on scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from attnopt.cost.efficiency import Efficiency
from attnopt.cost.target import Target


@dataclass(frozen=True)
class Phase:
    """flops: of matrix products, a multiply-add counted as two. operations: on single numbers.

    bytes: moved once, by a pass whose working set is `working_set`. rereads: bytes read again, from where `rereads_set` bytes stay.
    rows: of the products, the smaller side. tasks: parts that run side by side (0: as many as the machine likes).
    """

    what: str
    flops: float = 0.0
    operations: float = 0.0
    bytes: float = 0.0
    working_set: float = 0.0
    rereads: float = 0.0
    rereads_set: float = 0.0
    rows: float = math.inf
    tasks: float = 0.0
    launches: float = 1.0


@dataclass(frozen=True)
class Parts:
    """Seconds of a phase by what they are spent on; `total` is less than their sum where they overlap."""

    products: float
    scores: float
    memory: float
    launch: float
    total: float


def waves(tasks: float, units: int) -> float:
    """How much longer than evenly spread: the last wave of tasks leaves units idle. 1 where tasks or units are not known."""
    return math.ceil(tasks / units) * units / tasks if tasks > 0 and units > 0 else 1.0


def priced(phase: Phase, dtype: str, efficiency: Efficiency, target: Target) -> Parts:
    """The seconds of one phase on a target whose rates are known."""
    ramp = (
        1.0 + efficiency.ramp / phase.rows if phase.rows > 1 else 1.0
    )  # one row is no product: it is read once, and memory bounds it
    products = phase.flops / (target.rate(dtype) * efficiency.products) * ramp
    scores = phase.operations / (target.rate("float32") * efficiency.scores)
    memory = moved(phase.bytes, phase.working_set, target) + moved(phase.rereads, phase.rereads_set, target)
    memory /= efficiency.memory
    launch = phase.launches * (target.launch + efficiency.launch)
    longer, shorter = max(products + scores, memory), min(products + scores, memory)
    busy = longer + (1.0 - efficiency.overlap) * shorter
    return Parts(products, scores, memory, launch, launch + waves(phase.tasks, target.units) * busy)


def moved(count: float, working_set: float, target: Target) -> float:
    return count / target.bandwidth_at(working_set) if count else 0.0


def total(parts: Sequence[Parts]) -> float:
    return sum(p.total for p in parts)
