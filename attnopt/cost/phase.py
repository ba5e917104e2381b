"""A phase: one pass of a kernel, priced by the roofline.

    compute = flops / (peak * products) + operations / (float32 peak * scores)
    move    = bytes / (bandwidth of the working set * memory) + rereads / (bandwidth of theirs * memory)
    seconds = launches * launch + waves * (compute + move - what of the shorter hides behind the longer)

    waves   = ceil(tasks / units) * units / tasks         133 tiles on 132 units take as long as 264

Source: "Roofline: An Insightful Visual Performance Model" (Williams et al.), with a second roof for operations on scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnopt.cost.target import Target

Numbers = Any  # a float, or an array of them where many phases are priced at once


@dataclass(frozen=True)
class Phase:
    """flops: of matrix products, a multiply-add counted as two; more: of those in a second type. operations: on single numbers.

    bytes: moved once, by a pass whose working set is `working_set`. rereads: bytes read again, from where `rereads_set` bytes stay.
    rows: of the products, the smaller side. tasks: parts that run side by side (0: as many as the machine likes).
    family: whose shares of the target's rates hold. dtype: of its products, where it is not that of the whole; more_dtype: of `more`.
    """

    what: str
    family: str
    flops: float = 0.0
    operations: float = 0.0
    bytes: float = 0.0
    working_set: float = 0.0
    rereads: float = 0.0
    rereads_set: float = 0.0
    rows: float = math.inf
    tasks: float = 0.0
    launches: float = 1.0
    dtype: str = ""
    more: float = 0.0
    more_dtype: str = ""


@dataclass(frozen=True)
class Features:
    """Seconds of a phase at the full rates of the target, before any kernel's shares; numbers, or arrays of one length.

    launches: how many. few: one over the rows of its products. waves: see above.
    """

    products: Numbers
    scores: Numbers
    memory: Numbers
    launches: Numbers
    few: Numbers
    waves: Numbers


@dataclass(frozen=True)
class Parts:
    """Seconds of a phase by what they are spent on; `total` is less than their sum where they overlap."""

    products: Numbers
    scores: Numbers
    memory: Numbers
    launch: Numbers
    total: Numbers


def waves(tasks: float, units: int) -> float:
    """How much longer than evenly spread: the last wave of tasks leaves units idle. 1 where tasks or units are not known."""
    return math.ceil(tasks / units) * units / tasks if tasks > 0 and units > 0 else 1.0


def features(phase: Phase, dtype: str, target: Target) -> Features:
    return Features(
        products=phase.flops / target.rate(phase.dtype or dtype)
        + (phase.more and phase.more / target.rate(phase.more_dtype or dtype)),
        scores=phase.operations / target.rate("float32"),
        memory=moved(phase.bytes, phase.working_set, target) + moved(phase.rereads, phase.rereads_set, target),
        launches=phase.launches,
        few=1.0 / phase.rows,
        waves=waves(phase.tasks, target.units),
    )


def moved(count: float, working_set: float, target: Target) -> float:
    return count / target.bandwidth_at(working_set) if count else 0.0


def priced(at: Features, efficiency: Any, launch: float) -> Parts:
    """The seconds of a phase under an Efficiency (or what holds arrays under its names). launch: seconds of any call."""
    products = at.products / efficiency.products * (1.0 + efficiency.ramp * at.few)
    scores, memory = at.scores / efficiency.scores, at.memory / efficiency.memory
    started = at.launches * (launch + efficiency.launch)
    hidden = efficiency.overlap * np.minimum(products + scores, memory)
    return Parts(products, scores, memory, started, started + at.waves * (products + scores + memory - hidden))
