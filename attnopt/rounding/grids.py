"""Where the levels of each group lie: from its extremes, with the clip of least squared error, or fitted to a Gaussian.

    symmetric    step = clip * max|w| / (2^(bits-1) - 1), levels about 0; the sign of the step gives either side the extra level
    zero points  step = clip * (max - min) / (2^bits - 1), zero = round(-clip * min / step)
    gaussian     step = 2 s rms(w) / (2^bits - 1), levels in the middle of their bins, s the best clip of a unit Gaussian

A clip below 1 cuts off the largest weights so that the others have a finer step; the best is searched for each group among CLIPS.
Sources: GPTQ's grid search over clips; "QuEST: Stable Training of LLMs with 1-Bit Weights and Activations" for the Gaussian one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attnopt.rounding.rounded_before import RoundedBefore
from attnopt.rounding.rounded_weight import RoundedWeight, grouped, rounded
from attnopt.rounding.weight_format import WeightFormat

Kind = Literal["extremes", "squares", "gaussian"]
CLIPS = tuple(1.0 - 0.02 * i for i in range(36))  # 1 … 0.3
GAUSSIAN = {1: 0.79788, 2: 1.49353, 3: 2.05107, 4: 2.51393, 5: 2.91609, 6: 3.27660, 7: 3.60105, 8: 3.88494}
AT_ONCE = 2**17  # numbers that grids are tried on at a time: what a core's cache holds
BEFORE = RoundedBefore()
Grid = tuple[Tensor, Any]  # zero points are a tensor or one number


@dataclass(frozen=True)
class Gridding:
    """A way to lay levels. extremes: nothing is clipped. squares: the clip of least squared error. gaussian: fitted, no search."""

    kind: Kind = "squares"
    clips: Sequence[float] = CLIPS

    def grid(self, weight: Tensor, format: WeightFormat, importance: Tensor | None = None) -> Grid:
        """(steps, zeros) [out, groups] for weights [out, in]. importance [in]: what the squared error of each input counts."""
        if self.kind == "gaussian":
            return gaussian_grid(weight, format)
        parts = grouped(weight, format)
        counts = None if importance is None else importance.to(weight.dtype).reshape(parts.shape[1:])
        rows = max(1, AT_ONCE // max(1, weight.shape[1]))
        found = [self.searched(some, format, counts) for some in parts.split(rows)]
        steps, zeros = (torch.cat(some) for some in zip(*found, strict=True))
        return steps, zeros if format.zeros else float(format.middle)

    def searched(self, parts: Tensor, format: WeightFormat, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """(steps, zeros) of least error [out, groups] for weights [out, groups, in a group]: each group for itself."""
        tried = candidates(parts, format, self.clips if self.kind == "squares" else (1.0,))
        best: list[Tensor] = []
        for at in range(0, len(tried), many := max(1, AT_ONCE // max(1, parts.numel()))):
            steps, zeros = (torch.stack(some) for some in zip(*tried[at : at + many], strict=True))
            found = [errors(parts, steps, zeros, format, counts), steps, zeros]
            least = found[0].min(0, keepdim=True).indices
            found = [x.gather(0, least)[0] for x in found]
            better = found[0] < best[0] if best else None
            best = found if better is None else [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
        return best[1], best[2]

    def rounded(self, weight: Tensor, format: WeightFormat, importance: Tensor | None = None) -> RoundedWeight:
        """The nearest levels of the grid of these weights [out, in], which must be finite and fit the format (`unfit`)."""
        work = weight if weight.dtype == torch.float64 else weight.float()
        key = self.kind, tuple(self.clips), format
        return BEFORE.of(key, (work, importance), lambda: rounded(work, *self.grid(work, format, importance), format))


def errors(parts: Tensor, steps: Tensor, zeros: Tensor, format: WeightFormat, counts: Tensor | None) -> Tensor:
    """Squared errors [n, out, groups] of weights [out, groups, in a group] on n grids; counts: what each input counts."""
    codes = torch.round(parts / steps[..., None] + zeros[..., None]).clamp_(0, format.levels - 1)
    away = codes.sub_(zeros[..., None]).mul_(steps[..., None]).sub_(parts).square_()
    return (away if counts is None else away.mul_(counts)).sum(-1)


def candidates(parts: Tensor, format: WeightFormat, clips: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """Grids for groups [out, groups, n], one for each clip; symmetric ones for either sign."""
    made = []
    if format.zeros:
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        for clip in clips:
            steps = apart_from_zero(clip * (high - low) / (format.levels - 1))
            made.append((steps, torch.round(-clip * low / steps).clamp(0, format.levels - 1)))
        return made
    largest = parts.abs().amax(-1)
    middle = torch.full_like(largest, format.middle)
    for clip in clips:
        steps = apart_from_zero(clip * largest / max(format.middle - 0.5, 0.5))
        made += [(apart_from_zero(clip * largest / max(format.middle - 1, 1)), middle), (steps, middle), (-steps, middle)]
    return made


def gaussian_grid(weight: Tensor, format: WeightFormat) -> Grid:
    """Steps by the root mean square of each group; zero points between two codes."""
    root = grouped(weight, format).square().mean(-1).sqrt()
    return apart_from_zero(2 * GAUSSIAN[format.bits] * root / (format.levels - 1)), format.middle - 0.5


def apart_from_zero(steps: Tensor) -> Tensor:
    """Steps that can be divided by, and held in float32: those of groups of zeros are 1."""
    return torch.where(steps > torch.finfo(torch.float32).tiny, steps, torch.ones_like(steps))
