"""Losses of sets of moves, each measured once: in this process, and, where there is a store, ever.

    losses.of(moves) -> Loss          built from the original, run beside it on the half of the data to choose by

Predictions add losses up. Divergences and 1 - cosine grow with the square of a small disturbance, so those of independent
disturbances add; relative errors are lengths, whose squares add.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from attnopt.analysis.store import Store, key_of
from attnopt.plan.judge.judge import Judge, always
from attnopt.plan.judge.quality import METRICS, Loss
from attnopt.plan.options.proposals import Move, described
from attnopt.plan.options.workshop import Workshop
from attnopt.plan.search.effort import Spent


@dataclass
class Losses:
    """contents: a key of the model, the data and the metric, "" where nothing is kept on disk. failures: moves that did not run.

    needs: bytes that a model takes while it is measured.
    """

    judge: Judge
    workshop: Workshop
    spent: Spent
    store: Store = field(default_factory=Store)
    contents: str = ""
    needs: float = 0.0
    known: dict[str, Loss] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def of(
        self,
        moves: Sequence[Move],
        title: str = "loss of a plan",
        most: int | None = None,
        ends: Callable[[Loss], bool] = always,
    ) -> Loss:
        """What the model loses after these moves; infinite where it does not run. most: samples for a first idea, which is enough where
        `ends` says so of it.
        """
        if not moves:
            return Loss(self.judge.metric.name, 0.0, 0.0, self.judge.calibration.samples)
        whole = key_of(self.contents, *map(described, moves))
        few = key_of(whole, f"{most} samples") if most is not None and most < self.judge.calibration.samples else whole
        for key, enough in ((whole, always), (few, ends)):
            found = self.held(key)
            if found is not None and enough(found):
                return found
        self.spent.measurements += 1
        cut = list[Loss]()

        def ended(first: Loss) -> bool:
            if ends(first):
                cut.append(first)
            return bool(cut)

        loss = self.measured(moves, title, most if few != whole else None, ended)
        key = few if cut else whole
        self.known[key] = loss
        if self.contents and loss.samples:
            self.store.put(key, {"values": torch.tensor(loss.values, dtype=torch.float64)})
        return loss

    def held(self, key: str) -> Loss | None:
        """What was measured in this process, or is on disk."""
        if key not in self.known and self.contents and (kept := self.store.get(key)) is not None:
            self.spent.remembered += 1
            self.known[key] = Loss.of(self.judge.metric.name, kept["values"].tolist(), self.judge.seed)
        return self.known.get(key)

    def measured(self, moves: Sequence[Move], title: str, most: int | None, ends: Callable[[Loss], bool]) -> Loss:
        if not self.spent.fits(self.needs):
            why = f"it takes about {self.needs / 1e6:.3g} MB, with which the limit of {self.spent.memory_limit / 1e6:.3g} MB is passed"
            self.failures[described(moves[0])] = why
            return Loss(self.judge.metric.name, float("inf"), float("inf"), 0)
        try:
            return self.judge.loss(self.workshop.built(moves, brief=True), title, most, ends)
        except (RuntimeError, NotImplementedError, ValueError) as failure:
            self.failures[described(moves[0])] = str(failure).splitlines()[0][:160]
            return Loss(self.judge.metric.name, float("inf"), float("inf"), 0)

    @property
    def power(self) -> int:
        """Which power of losses adds up."""
        return 2 if self.judge.metric.name == METRICS["relative"].name else 1

    def additive(self, loss: float) -> float:
        """A loss as what adds up; a gain counts as nothing."""
        return float(max(loss, 0.0) ** self.power)

    def total(self, added: float) -> float:
        """A sum of those as a loss."""
        return float(added ** (1.0 / self.power))
