"""After a search for time: what makes the model smaller, and not slower, is added where the budget has room left.

    24 layers in int8, at most 0.0083 of 0.01   ->   + tables as int4: up to 0.03, no   + tables as int8: 0.0084, 1.00x, 35 MB less: kept

Two things are left over by a search. Tables that rows are looked up in are the larger half of a small model's file, and no time is saved
by them: a search that is short of minutes never measures what they lose. And groups whose rewrite was undone, because it was slower than
predicted, stay as they were, though another kind may suit them. So each kind that keeps weights in less is tried last, in all groups that
nothing was taken for, those first that are worth most: its loss where the plan was chosen by, its time in turn with the model before it,
and the whole plan on the data held back, at a higher confidence than the plan itself. A search whose budget is 0 never comes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from attnopt.plan.judge.quality import Loss
from attnopt.plan.options.proposals import Move, Proposal
from attnopt.plan.search.knapsack import Place
from attnopt.plan.search.roll_back import EVEN
from attnopt.report.search import StepReport

if TYPE_CHECKING:
    from attnopt.plan.search.search import Search

TRIED = 6  # kinds


@dataclass
class Smaller:
    """What is added to a plan. picks and kept: of the plan that was checked, its options and the moves that stay; loss: what it loses.

    steps: each kind that was tried, with why it was kept or not. undone: (kind, group) that a check has undone already.
    """

    search: Search
    picks: tuple[int, ...]
    kept: tuple[Move, ...]
    loss: Loss | None
    undone: frozenset[tuple[str, str]] = frozenset()
    steps: list[StepReport] = field(default_factory=list)
    attempts: int = 0

    def run(self) -> Smaller:
        found: dict[str, float] = {}
        for option in self.options(self.places()):
            found[option.kind] = found.get(option.kind, 0.0) + self.search.worth(option)
        for kind in sorted(found, key=lambda k: -found[k])[:TRIED]:
            if places := self.together(kind):
                self.tried(places)
        return self

    def options(self, places: Sequence[Place]) -> list[Proposal]:
        return [self.search.classes[g].options[i] for g, i in places]

    def places(self) -> list[Place]:
        """The options that make weights smaller and save time or cost none, as far as is known, of groups that nothing is kept for."""
        search, found = self.search, list[Place]()
        for g, each in enumerate(search.classes):
            if any(m in self.kept for m in each.options[self.picks[g]].moves):
                continue
            for i, o in enumerate(each.options):
                apart = o.moves and not any(m.excludes(k) for m in o.moves for k in self.kept)
                if apart and self.fits(o) and search.worth(o) > 0 and search.memory.saved((*self.kept, *o.moves)) > self.saved:
                    found.append((g, i))
        return found

    def fits(self, option: Proposal) -> bool:
        """Whether it only changes how weights are held, was not undone, and does not lose too much everywhere."""
        known = self.search.everywhere.get(option.kind)
        weights = all(set(m.candidate.changes) == {"weights"} and not m.candidate.tie for m in option.moves)
        hopeless = known is not None and known.samples and known.mean > self.search.allowed
        return weights and not hopeless and not self.undone & {(option.kind, name) for name in names([option])}

    @property
    def saved(self) -> float:
        return self.search.memory.saved(self.kept)

    def together(self, kind: str) -> list[Place]:
        """The options of a kind that can be taken together, one for each class."""
        taken, moves = list[Place](), list[Move]()
        for g, i in self.places():
            option = self.search.classes[g].options[i]
            free = option.kind == kind and all(g != place[0] for place in taken)
            if free and not any(m.excludes(other) for m in option.moves for other in moves):
                taken.append((g, i))
                moves += option.moves
        return taken

    def tried(self, places: Sequence[Place]) -> None:
        """Make these options a part of the plan, where that holds; a step says why or why not."""
        search, options, at = self.search, self.options(places), dict(places)
        picks = tuple(at.get(g, i) for g, i in enumerate(self.picks))
        moves = in_plan(search, picks, [*self.kept, *(m for o in options for m in o.moves)])
        here = search.losses.of(moves, f"with {options[0].kind}")
        why, seconds, loss = self.judged(moves, here, EVEN if all(m.narrows for o in options for m in o.moves) else 1.0)
        if loss is not None:
            freed = search.memory.saved(moves) - self.saved
            why += f", loss {here.mean:.2g} so far, and {freed / 1e6:.3g} MB smaller: added, the budget had room"
            self.picks, self.kept, self.loss = picks, moves, loss
        said = why if loss is not None else f"to make the model smaller: {why}"
        step = StepReport(options[0].kind, len(names(options)), loss is not None, said, *seconds, here.mean, names(options))
        self.steps.append(step)

    def judged(self, moves: Sequence[Move], here: Loss, limit: float) -> tuple[str, tuple[float, float], Loss | None]:
        """(what was measured, seconds before and after, the loss that the plan then has, None where it is slower or loses too much)."""
        search = self.search
        assert search.stopwatch is not None
        if not search.holds(here):
            return f"loss up to {search.limit(here):.2g}, over the budget {search.allowed:g}", (0.0, 0.0), None
        built = search.losses.workshop.built
        before = built(self.kept).runner() if self.kept else search.stopwatch.exact
        times = search.stopwatch.times({"before": before, "after": built(moves).runner()})
        ratio, seconds = times["after"].ratio(times["before"]), (times["before"].median, times["after"].median)
        said = f"measured {1 / ratio:.2f}x the speed of the model before it"
        if ratio > limit:
            return f"{said}: it is slower", seconds, None
        if search.validator is None:
            return said, seconds, here
        self.attempts += 1
        loss = search.validation(moves, self.attempts)
        if search.holds(loss):
            return said, seconds, loss
        over = f"loss up to {search.limit(loss):.2g} on the data held back, over the budget {search.allowed:g}"
        return f"{said}, {over}", seconds, None


def in_plan(search: Search, picks: Sequence[int], moves: Sequence[Move]) -> tuple[Move, ...]:
    """These moves in the order of the picks."""
    ordered = (m for each, pick in zip(search.classes, picks, strict=True) for m in each.options[pick].moves)
    return tuple(m for m in ordered if m in moves)


def names(options: Sequence[Proposal]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(m.group.name for o in options for m in o.moves))
