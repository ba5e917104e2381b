"""Tune the candidates that need it: their pass takes a few steps on calibration data and puts what it found into their options.

    needs="tuning", --tune    ->   rewrite.tune(candidate, group, evidence)   ->   a candidate with numbers, priced and judged as any
    needs="tuning", else      ->   Refusal("'rank 32' needs tuning: --tune")            effort high tunes as well

The same seed and data give the same numbers. They are found on the half of the data to choose by; the other half judges them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnopt.ir.site import Refusal
from attnopt.passes import Candidate, Evidence, Group, Pass
from attnopt.passes.candidate import Tunes
from attnopt.plan.search.effort import Spent


@dataclass(frozen=True)
class Tuning:
    """data: whether there are calibration data, of which a half judges what was tuned on the other."""

    spent: Spent
    data: bool
    seed: int = 0

    def of(self, rewrite: Pass, group: Group, candidate: Candidate, evidence: Evidence | None) -> Candidate | Refusal:
        """The candidate as it can be applied: as it is, or tuned; or why not."""
        if candidate.needs != "tuning":
            return candidate
        what = f"'{candidate.kind or candidate.description}' needs tuning"
        if not self.spent.effort.tunes:
            return Refusal(f"{what}: --tune", group.name)
        if evidence is None or not self.data:
            return Refusal(f"{what}, and there are no calibration data", group.name)
        if self.spent.over:
            return Refusal(f"{what}, and time is up", group.name)
        if not isinstance(rewrite, Tunes):
            raise TypeError(f"{type(rewrite).__name__} proposes what needs tuning, and has no method `tune`")
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        try:
            with torch.random.fork_rng(devices=devices), torch.enable_grad():
                torch.manual_seed(self.seed)
                self.spent.measurements += 1
                return rewrite.tune(candidate, group, evidence)
        except (RuntimeError, ValueError, NotImplementedError) as failure:
            return Refusal(f"{what}, which failed: {str(failure).splitlines()[0][:160]}", group.name)
