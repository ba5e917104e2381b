"""Is the result the same model? Largest differences between two lists of outputs, against what their dtype allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnopt.errors import AccuracyError
from attnopt.ir.site import Runner
from attnopt.report.data import Difference

# Largest |a - b| / max(1, largest |a|) between two exact computations of one model in the given dtype.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
ROUNDED = 0.25  # of what rounding to codes changes, two runtimes may differ by; measured on the recall model: 0.015


def difference(before: Sequence[Tensor], after: Sequence[Tensor], *, exact: bool = True) -> Difference:
    """Largest absolute difference, and relative to the largest element of its output. NaN of the original is no promise.

    Raises AccuracyError where outputs differ in number or shape, or where a NaN appears that was not there.
    """
    max_abs = max_rel = 0.0
    tolerance = max((TOLERANCES.get(str(t.dtype).removeprefix("torch."), 0.0) for t in before), default=0.0)
    if len(before) != len(after) and not exact:  # parts of a cache went, or became several: what losses are measured on is left
        before, after = ([t for t in some if t.is_floating_point()][:1] for some in (before, after))
    if len(before) != len(after):
        raise AccuracyError(float("inf"), float("inf"), tolerance)
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape:
            raise AccuracyError(float("inf"), float("inf"), tolerance)
        if a.numel() == 0:
            continue
        known = ~torch.isnan(a) if a.is_floating_point() else torch.ones_like(a, dtype=torch.bool)
        kept, other = a[known].to(torch.float64), b[known].to(torch.float64)
        gap = (kept - other).abs().masked_fill(kept == other, 0.0)  # equal infinities differ by nothing
        if kept.numel() == 0:
            continue
        worst = float(gap.max()) if not bool(torch.isnan(gap).any()) else float("inf")
        size = float(kept[kept.isfinite()].abs().max()) if bool(kept.isfinite().any()) else 1.0
        max_abs, max_rel = max(max_abs, worst), max(max_rel, worst / max(size, 1.0))
    return Difference(max_abs, max_rel, tolerance, exact)


def seeded(run: Runner, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """One run from a fixed seed, so that a model that draws random numbers (masked autoencoders) draws the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return run(inputs)


def require_equal(before: Sequence[Tensor], after: Sequence[Tensor]) -> Difference:
    """The difference, or AccuracyError where it is larger than the dtype allows."""
    found = difference(before, after)
    if not found.max_rel <= found.tolerance:
        raise AccuracyError(found.max_abs, found.max_rel, found.tolerance)
    return found


def require_rounded_alike(before: Sequence[Tensor], after: Sequence[Tensor], unrounded: Sequence[Tensor]) -> Difference:
    """The difference of two runtimes that round alike, or AccuracyError where it is not a small share of what the rounding does.

    A number beside the border of two codes falls to either side, and moves all that is computed from it. unrounded: `after` without
    its rounding. Compared is the first real output: codes themselves may all be one apart.
    """
    first = [next(([t] for t in some if t.is_floating_point()), list(some)) for some in (before, after, unrounded)]
    found, rounding = difference(first[0], first[1]), difference(first[0], first[2])
    allowed = found.tolerance + ROUNDED * rounding.max_rel
    if not found.max_rel <= allowed:
        raise AccuracyError(found.max_abs, found.max_rel, allowed)
    return found
