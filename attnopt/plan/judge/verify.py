"""Is the result the same model? Largest differences between two lists of outputs, against what their dtype allows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from attnopt.errors import AccuracyError, UntraceableModel
from attnopt.ir.site import Runner
from attnopt.report.data import Difference

# Largest |a - b| / max(1, largest |a|) between two exact computations of one model in the given dtype.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
NUDGED = 2.0  # of what one runtime differs by from itself with its inputs nudged, two may differ by
ROUNDED = 0.25  # of what rounding to codes changes, two runtimes may differ by; measured on the recall model: 0.015


class OwnModel(Protocol):
    """A model as its user has it, on named inputs: what it returns, in its own type or as a graph's runner does."""

    def __call__(self, inputs: Mapping[str, Tensor], /) -> Any: ...

    def outputs(self, inputs: Mapping[str, Tensor], /) -> list[Tensor]: ...


def difference(
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    *,
    exact: bool = True,
    names: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> Difference:
    """Largest absolute difference, and relative to the largest element of its output. NaN of the original is no promise.

    names: of the outputs of both, by which those are matched that both have, where a rewrite removed some or made several of one.
    Raises AccuracyError where outputs differ in number or shape, or where a NaN appears that was not there.
    """
    max_abs = max_rel = 0.0
    tolerance = max((TOLERANCES.get(str(t.dtype).removeprefix("torch."), 0.0) for t in before), default=0.0)
    if len(before) != len(after) and not exact:  # parts of a cache went, or became several
        named = [(i, j) for i, j in shared(*names) if alike(before[i], after[j])]
        places = named or first_real(before, after)
        before, after = [before[i] for i, _ in places], [after[j] for _, j in places]
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


def shared(before: Sequence[str], after: Sequence[str]) -> list[tuple[int, int]]:
    """Places of the outputs that both have: of a numbered family (present.0, present.1, …) all or, where its size changed, none.

    What is left of a family moves up, so that one name may stand for another layer.
    """
    families = [Counter(map(family, names)) for names in (before, after)]
    whole = {name for name, count in families[0].items() if families[1][name] == count}
    return [(i, after.index(name)) for i, name in enumerate(before) if family(name) in whole and name in after]


def alike(before: Tensor, after: Tensor) -> bool:
    """Whether they can be compared: a cache of codes keeps the name of what it held, and neither its type nor its shape."""
    return before.dtype == after.dtype and before.shape == after.shape


def family(name: str) -> str:
    """The name without its numbers."""
    return re.sub(r"\d+", "#", name)


def first_real(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[tuple[int, int]]:
    """What losses are measured on: the first output of real numbers."""
    found = [next((i for i, t in enumerate(some) if t.is_floating_point()), None) for some in (before, after)]
    return [] if found[0] is None or found[1] is None else [(found[0], found[1])]


def seeded(run: Runner, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """One run from a fixed seed, so that a model that draws random numbers (masked autoencoders) draws the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return run(inputs)


def require_same_model(own: Sequence[Tensor], traced: Sequence[Tensor]) -> None:
    """UntraceableModel where a graph computes something else than the model it was traced from."""
    try:
        found = difference(own, traced)
    except AccuracyError as failure:
        found = Difference(failure.max_abs, failure.max_rel, failure.tolerance)
    if not found.max_rel <= found.tolerance:
        raise UntraceableModel(
            f"the graph that torch.export made computes something else than the model: its outputs differ by {found.max_abs:.3g}",
            next_move="Make what the model does depend on its inputs alone, or give the program that you exported yourself.",
        )


def require_equal(before: Sequence[Tensor], after: Sequence[Tensor]) -> Difference:
    """The difference, or AccuracyError where it is larger than the dtype allows."""
    found = difference(before, after)
    if not found.max_rel <= found.tolerance:
        raise AccuracyError(found.max_abs, found.max_rel, found.tolerance)
    return found


def require_rounded_alike(
    before: Sequence[Tensor], after: Sequence[Tensor], unrounded: Sequence[Tensor], nudged: Sequence[Tensor] | None = None
) -> Difference:
    """The difference of two runtimes that round alike, or AccuracyError where it is more than rounding alike explains.

    A number beside the border of two codes falls to either side, and moves all that is computed from it: with many layers behind it a
    last bit comes to a part of what the rounding itself changes. unrounded: `after` without its rounding. nudged: `after` computed
    again from inputs that moved by about a last bit, which shows how far this goes in this model. Compared is the first real output:
    codes themselves may all be one apart.
    """
    first = [
        next(([t] for t in some if t.is_floating_point()), list(some)) for some in (before, after, unrounded, nudged or after)
    ]
    found, rounding, moved = difference(first[0], first[1]), difference(first[0], first[2]), difference(first[1], first[3])
    allowed = found.tolerance + max(ROUNDED * rounding.max_rel, NUDGED * moved.max_rel)
    if not found.max_rel <= allowed:
        raise AccuracyError(found.max_abs, found.max_rel, allowed)
    return found
