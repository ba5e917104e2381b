"""Check a plan step by step on the target, and undo what is slower or loses more than predicted: alone, where that helps.

    exact -> + int8 of 12 layers (1.31x: kept) -> + windows of 6 (0.98x: in halves) -> of 3 (1.05x: kept) -> of 2 (1.01x: kept)
                                                                                   -> of layers.4 (0.9x: undone)

A kind of rewrite is one step. Where the model does not get faster by it, or by less than half of what was predicted, its groups are
cut in halves, those that gain most first, and each half is a step, down to single groups, while a share of the effort's time lasts.
Groups that are tied are one: they stay or go together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from attnopt.ir.site import Runner
from attnopt.plan.judge.losses import Losses
from attnopt.plan.options.groups import united
from attnopt.plan.options.proposals import Class, Move, Proposal
from attnopt.plan.timing.stepwise import Stopwatch
from attnopt.report.search import StepReport

SHORT = 0.5  # a step that saves less than this share of what was predicted is looked at in halves
EVEN = 1.03  # the noise of a timing: a step that only makes the model smaller may measure so much slower
SHARE = 0.25  # of the effort's seconds, for steps beyond the first of each kind


@dataclass(frozen=True)
class Unit:
    """Moves that stay or go together. gain: the seconds that they are predicted to save. names: of their groups."""

    kind: str
    moves: tuple[Move, ...]
    gain: float

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(m.group.name for m in self.moves))


def units_of(classes: Sequence[Class], picks: Sequence[int], worth: Callable[[Proposal], float]) -> list[Unit]:
    """What of a plan can be undone on its own: each option that was taken, and together those that are tied; by gain."""
    taken = [each.options[i] for each, i in zip(classes, picks, strict=True) if each.options[i].moves]
    joined = united(taken, lambda o: [o, *(m.candidate.tie for m in o.moves if m.candidate.tie)])
    units = [Unit(some[0].kind, tuple(m for o in some for m in o.moves), sum(worth(o) for o in some)) for some in joined]
    return sorted(units, key=lambda u: -u.gain)


@dataclass(frozen=True)
class Trial:
    """The model with some units more: its time over that of the model before, and its loss where it is faster."""

    moves: tuple[Move, ...]
    runner: Runner
    ratio: float
    seconds: tuple[float, float]
    loss: float | None
    allowed: float
    limit: float = 1.0

    @property
    def wrong(self) -> str:
        """Why the units are undone; "" where they stay."""
        if self.ratio >= self.limit:
            return "it is not faster" if self.limit == 1.0 else "it is slower"
        return "that is over the budget" if self.loss is None or self.loss > self.allowed else ""

    def step(self, units: Sequence[Unit], more: str = "") -> StepReport:
        said = f"measured {1 / self.ratio:.2f}x the speed of the model before it"
        said += f", loss {self.loss:.2g} so far" if self.loss is not None else ""
        said += f": undone, {self.wrong}" if self.wrong else more
        names = tuple(name for u in units for name in u.names)
        return StepReport(units[0].kind, len(names), not self.wrong, said, *self.seconds, self.loss, names)


@dataclass
class Check:
    """Steps are added to `kept` as they hold. order: the moves of the whole plan. share: time of the model over that of the exact one."""

    order: Sequence[Move]
    watch: Stopwatch
    losses: Losses
    allowed: float
    kept: tuple[Move, ...] = ()
    share: float = 1.0
    steps: list[StepReport] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.runner = self.watch.exact

    def run(self, units: Sequence[Unit]) -> None:
        """One kind after the other, in the order of the units."""
        for kind in dict.fromkeys(u.kind for u in units):
            self.kind([u for u in units if u.kind == kind])

    def kind(self, units: Sequence[Unit]) -> None:
        whole = self.tried(units)
        fair = not whole.wrong and not self.short(whole, units)
        if fair or len(units) == 1 or self.late:
            self.decide(whole, units)
            return
        before = self.kept, self.runner, self.share, len(self.steps)
        self.halves(units)
        if whole.wrong:
            return
        times = self.watch.times({"before": whole.runner, "after": self.runner})
        if self.kept == whole.moves or times["after"].ratio(times["before"]) >= 1.0:
            self.kept, self.runner, self.share = before[:3]
            del self.steps[before[3] :]
            self.decide(whole, units, ": less than predicted, but leaving parts out makes it no faster")

    def halves(self, units: Sequence[Unit]) -> None:
        middle = (len(units) + 1) // 2
        for half in (units[:middle], units[middle:]):
            trial = self.tried(half)
            if trial.wrong and len(half) > 1 and not self.late:
                self.halves(half)
            else:
                self.decide(trial, half)

    def decide(self, trial: Trial, units: Sequence[Unit], more: str = "") -> None:
        self.steps.append(trial.step(units, more))
        if not trial.wrong:
            self.kept, self.runner, self.share = trial.moves, trial.runner, self.share * trial.ratio

    def tried(self, units: Sequence[Unit]) -> Trial:
        moves = in_order(self.order, [*self.kept, *(m for u in units for m in u.moves)])
        runner = self.losses.workshop.built(moves).runner()
        times = self.watch.times({"before": self.runner, "after": runner})
        ratio = times["after"].ratio(times["before"])
        limit = EVEN if all(m.narrows for u in units for m in u.moves) else 1.0
        loss = self.losses.of(moves, f"after {units[0].kind}").mean if ratio < limit else None
        return Trial(moves, runner, ratio, (times["before"].median, times["after"].median), loss, self.allowed, limit)

    def short(self, trial: Trial, units: Sequence[Unit]) -> bool:
        """Whether so much less is saved than was predicted that some group must be slower than before."""
        predicted = sum(u.gain for u in units) / self.watch.reference if self.watch.reference else 0.0
        return self.share * (1.0 - trial.ratio) < SHORT * predicted

    @property
    def late(self) -> bool:
        return time.perf_counter() - self.started > SHARE * self.losses.spent.effort.seconds


def in_order(moves: Sequence[Move], some: Sequence[Move]) -> tuple[Move, ...]:
    """These moves in the order of the plan, so that equal sets have equal keys."""
    return tuple(m for m in moves if m in some)
