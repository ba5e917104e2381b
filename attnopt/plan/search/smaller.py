"""After a search for time: what makes the model smaller, and not slower, is added where the budget has room left.

    24 layers in int8, at most 0.0083 of 0.01   ->   + tables as int4: up to 0.03, no   + tables as int8: 0.0084, 1.00x, 35 MB less: kept

Tables that rows are looked up in are the larger half of a small model's file, and no time is saved by them: a search that is short of
minutes never measures what they lose. So each option that only narrows tables is tried last, those first that free most: its loss where
the plan was chosen by, its time in turn with the model before it, and the whole plan on the data held back, at a higher confidence than
the plan itself. The first that holds is taken. A search whose budget is 0 never comes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from attnopt.plan.judge.quality import Loss
from attnopt.plan.options.proposals import Move, Proposal
from attnopt.plan.search.roll_back import EVEN
from attnopt.report.search import StepReport

if TYPE_CHECKING:
    from attnopt.plan.search.search import Search

TRIED = 4  # options for each class of groups


@dataclass
class Smaller:
    """What is added to a plan. picks and kept: of the plan that was checked, its options and the moves that stay; loss: what it loses.

    steps: each option that was tried, with why it was kept or not. undone: (kind, group) that a check has undone already.
    """

    search: Search
    picks: tuple[int, ...]
    kept: tuple[Move, ...]
    loss: Loss | None
    undone: frozenset[tuple[str, str]] = frozenset()
    steps: list[StepReport] = field(default_factory=list)
    attempts: int = 0

    def run(self) -> Smaller:
        for g, each in enumerate(self.search.classes):
            if any(m in self.kept for m in each.options[self.picks[g]].moves):
                continue
            left = [x for x in options_of(self.search, each.options, self.kept) if not self.undone & {*places(x[1])}]
            for i, option in left[:TRIED]:
                if self.taken(g, i, option):
                    break
        return self

    def taken(self, g: int, i: int, option: Proposal) -> bool:
        """Whether this option is now a part of the plan; a step says why."""
        search = self.search
        assert search.stopwatch is not None
        picks = (*self.picks[:g], i, *self.picks[g + 1 :])
        moves = in_plan(search, picks, [*self.kept, *option.moves])
        if not search.holds(here := search.losses.of(moves, f"with {option.kind}")):
            return self.refused(option, here.mean, f"loss up to {search.limit(here):.2g}, over the budget {search.allowed:g}")
        built = search.losses.workshop.built
        before = built(self.kept).runner() if self.kept else search.stopwatch.exact
        times = search.stopwatch.times({"before": before, "after": built(moves).runner()})
        ratio, seconds = times["after"].ratio(times["before"]), (times["before"].median, times["after"].median)
        said = f"measured {1 / ratio:.2f}x the speed of the model before it"
        if ratio >= EVEN:
            return self.refused(option, here.mean, f"{said}: it is slower", seconds)
        loss = here
        if search.validator is not None:
            self.attempts += 1
            loss = search.validation(moves, self.attempts)
        if not search.holds(loss):
            why = f"{said}, loss up to {search.limit(loss):.2g} on the data held back, over the budget {search.allowed:g}"
            return self.refused(option, here.mean, why, seconds)
        freed = search.memory.saved(moves) - search.memory.saved(self.kept)
        why = f"{said}, loss {here.mean:.2g} so far, and {freed / 1e6:.3g} MB smaller: added, the budget had room"
        self.steps.append(StepReport(option.kind, 1, True, why, *seconds, here.mean, names(option)))
        self.picks, self.kept, self.loss = picks, moves, loss
        return True

    def refused(self, option: Proposal, loss: float, why: str, seconds: tuple[float, float] = (0.0, 0.0)) -> bool:
        self.steps.append(StepReport(option.kind, 1, False, f"to make the model smaller: {why}", *seconds, loss, names(option)))
        return False


def options_of(search: Search, options: Sequence[Proposal], kept: Sequence[Move]) -> list[tuple[int, Proposal]]:
    """(place, option) of those that only narrow tables, and can be taken beside what is kept; those first that free most."""
    found = [
        (i, o)
        for i, o in enumerate(options)
        if o.moves and all(m.narrows for m in o.moves) and not any(m.excludes(k) for m in o.moves for k in kept)
    ]
    return sorted(found, key=lambda x: -search.memory.saved(x[1].moves))


def in_plan(search: Search, picks: Sequence[int], moves: Sequence[Move]) -> tuple[Move, ...]:
    """These moves in the order of the picks."""
    ordered = (m for each, pick in zip(search.classes, picks, strict=True) for m in each.options[pick].moves)
    return tuple(m for m in ordered if m in moves)


def names(option: Proposal) -> tuple[str, ...]:
    return tuple(dict.fromkeys(m.group.name for m in option.moves))


def places(option: Proposal) -> tuple[tuple[str, str], ...]:
    return tuple((option.kind, name) for name in names(option))
