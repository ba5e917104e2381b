"""The search: measure what kinds of rewrites save and lose, solve for the best plan within the budget, measure that plan, tighten.

    every kind everywhere   ->  what it saves, what it loses          each option alone  ->  its own loss, while time lasts
    solve -> measure whole on the half to choose by -> scale the predicted losses by measured / predicted -> solve again
    validate the best on the other half, which nothing has seen; where it fails, tighten and try the next, at a higher confidence

Losses are predicted to add up (`losses`); the measurement of the whole has the last word. Nothing is drawn at random but by the seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from attnopt.ir.site import Refusal
from attnopt.plan.bound import LEVEL, upper_bound
from attnopt.plan.effort import Effort, Spent
from attnopt.plan.judge import Judge
from attnopt.plan.knapsack import Option, Place, Problem, Solution, solve
from attnopt.plan.losses import Losses
from attnopt.plan.memory import Memory
from attnopt.plan.pricing import Prices, Timed
from attnopt.plan.proposals import Class, Move, Proposal, exclusions_of, kinds_of, moves_of, places, ties_of, uniform
from attnopt.plan.quality import Loss
from attnopt.plan.stepwise import Stopwatch

ATTEMPTS = 4  # plans that are validated at most
NEAR = 0.85  # a plan that uses this share of the budget is not loosened further
LOOSE = 1e-3  # a factor on losses below which they keep no option out
SOLVER = 10.0  # seconds for one integer program
GOALS = ("time", "memory")  # what a user may ask to be least
EVERYTHING = 1.0  # what any rewrite is worth with select="always"


@dataclass(frozen=True)
class Planned:
    """One plan: the option of each class, what it saves as predicted, its loss where it was chosen by."""

    picks: tuple[int, ...]
    saved: float
    loss: Loss


@dataclass
class Bracket:
    """The factor on predicted losses, searched between the largest that was too small and the smallest with a plan that holds."""

    guess: float = 1.0
    low: float = 0.0
    high: float = math.inf

    def told(self, holds: bool, ratio: float | None = None) -> None:
        """What the plan at the guess did; ratio: measured over predicted, the factor that would have been right."""
        if holds:
            self.high = min(self.high, self.guess)
        else:
            self.low = max(self.low, self.guess)
        between = (
            self.guess / 2 if self.low == 0 else 2 * self.guess if self.high == math.inf else math.sqrt(self.low * self.high)
        )
        wanted = between if ratio is None or not math.isfinite(ratio) else 1.02 * ratio
        self.guess = wanted if 1.02 * self.low < wanted < 0.98 * self.high else between

    @property
    def closed(self) -> bool:
        """Whether no other plan is to be expected: the ends meet, or losses do not matter."""
        return self.high < 1.05 * self.low or self.high < LOOSE


@dataclass
class Search:
    """All that a search needs, and what it finds on the way.

    validator: the judge on the other half; None where there are no data but the examples, on which then the mean has to do.
    stopwatch: None where nothing is timed. goal: "time", "memory" (bytes of weights and cache), or "everything" (as many rewrites as hold).
    """

    classes: Sequence[Class]
    prices: Prices
    memory: Memory
    losses: Losses
    validator: Judge | None
    allowed: float
    effort: Effort
    spent: Spent
    stopwatch: Stopwatch | None = None
    goal: str = "time"
    alone: dict[tuple[int, int], Loss] = field(default_factory=dict)
    everywhere: dict[str, Loss] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    least: Loss | None = None  # the smallest loss of any plan that was measured
    gap: float = 0.0

    def found(self) -> tuple[Planned | None, Loss | None]:
        """The best plan that holds the budget, with its validated loss; None where no plan does."""
        if not self.kinds:
            return None, None
        self.measure_kinds()
        self.measure_options()
        return self.validated()

    @property
    def kinds(self) -> list[str]:
        return list(self.counts)

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Every kind, and how many groups it is offered to."""
        return kinds_of(self.classes)

    @cached_property
    def bonds(self) -> tuple[tuple[tuple[Place, ...], ...], tuple[tuple[Place, Place], ...]]:
        """Ties and exclusions."""
        return ties_of(self.classes), exclusions_of(self.classes)

    # Measure.

    def measure_kinds(self) -> None:
        """Each kind everywhere: its loss, and what its options save, for all shapes together and for each."""
        for kind in self.kinds:
            moves = moves_of(self.classes, uniform(self.classes, kind))
            self.everywhere[kind] = self.losses.of(moves, f"{kind} everywhere")
            if self.stopwatch is not None and self.everywhere[kind].samples:
                self.time_kind(kind)

    def time_kind(self, kind: str) -> None:
        assert self.stopwatch is not None
        by_key: dict[tuple[str, str], list[Proposal]] = {}
        for _, option in places(self.classes):
            if option.kind == kind:
                by_key.setdefault(self.prices.key(option), []).append(option)
        whole = moves_of(self.classes, uniform(self.classes, kind))
        plans = {(kind, ""): whole}
        if len(by_key) > 1:
            plans |= {key: tuple(m for m in whole if m in own_moves(options)) for key, options in by_key.items()}
        for key, saved in self.stopwatch.saved(plans, self.losses.workshop.built).items():
            touched = [
                o for k, options in by_key.items() if key in (k, (kind, "")) for o in options if set(o.moves) <= set(whole)
            ]
            before = sum(self.prices.predicted(o)[0] for o in touched)
            self.prices.timed[key] = Timed(saved, before, max(1, len(touched)))

    def measure_options(self) -> None:
        """Each option alone, those that save most first, while time lasts; what is not measured is predicted from its kind."""
        waiting = sorted(
            ((place, o) for place, o in places(self.classes) if o.moves and self.worth(o) > 0),
            key=lambda found: (-self.worth(found[1]), found[0]),
        )
        skipped = crowded = 0
        for place, option in waiting:
            if self.spent.over:
                skipped += 1
            elif self.spent.fits(self.losses.needs):
                self.alone[place] = self.losses.of(option.moves, option.description)
            else:
                crowded += 1
        if crowded:
            self.notes.append(
                f"{crowded} of {len(waiting)} options were not measured alone: the search would have held more than "
                f"{self.spent.memory_limit / 2**30:.3g} GiB"
            )
        if skipped:
            self.notes.append(
                f"{skipped} of {len(waiting)} options were not measured alone: time was up, a higher effort has more"
            )

    # Choose.

    def worth(self, option: Proposal) -> float:
        if self.goal == "everything":
            return EVERYTHING * len(option.moves)
        return self.memory.saved(option.moves) if self.goal == "memory" else self.prices.saved(option)

    def predicted(self, place: tuple[int, int]) -> float:
        """The additive loss of an option: its own, else its share of what its kind loses everywhere."""
        option = self.classes[place[0]].options[place[1]]
        if not option.moves:
            return 0.0
        if place in self.alone:
            return self.losses.additive(self.alone[place].mean)
        return self.losses.additive(self.everywhere[option.kind].mean) / self.counts[option.kind]

    def problem(self, scale: float, allowed: float) -> Problem:
        groups = []
        span = max((abs(self.worth(o)) for _, o in places(self.classes)), default=0.0) or 1.0
        budget = self.losses.additive(allowed) or 1.0
        for g, each in enumerate(self.classes):
            losses = [self.predicted((g, i)) for i in range(len(each.options))]
            worths = [self.worth(o) for o in each.options]
            # Where two plans save alike, the one that loses less.
            groups.append(tuple(Option(-w + 1e-6 * span * x / budget, scale * x) for w, x in zip(worths, losses, strict=True)))
        return Problem(tuple(groups), *self.bonds)

    def chosen(self, allowed: float) -> list[Planned]:
        """Plans that lose no more where they were chosen by, best first: solved for and tightened, and each kind everywhere."""
        held: dict[tuple[int, ...], Planned] = {}
        scales, tried = Bracket(), dict[tuple[int, ...], Planned]()
        for _ in range(self.effort.rounds):
            solution = self.solved(scales.guess, allowed)
            if solution is None or not any(solution.picks):
                scales.told(True)
            elif solution.picks in tried:
                scales.told(self.limit(tried[solution.picks].loss) <= allowed)
            else:
                plan = tried[solution.picks] = self.judged(solution.picks)
                measured, predicted = self.losses.additive(self.limit(plan.loss)), solution.loss / scales.guess
                holds = self.limit(plan.loss) <= allowed
                scales.told(holds, measured / predicted if predicted > 0 else None)
                if holds:
                    held[plan.picks] = plan
                    if self.limit(plan.loss) >= NEAR * allowed:
                        break
            if scales.closed or self.spent.seconds > 2 * self.effort.seconds:
                break
        for kind, loss in self.everywhere.items():
            picks = uniform(self.classes, kind)
            if any(picks) and self.limit(loss) <= allowed:
                held.setdefault(picks, Planned(picks, self.total_worth(picks), loss))
        return sorted(held.values(), key=lambda p: (-p.saved, p.picks))

    def solved(self, scale: float, allowed: float) -> Solution | None:
        solution = solve(self.problem(scale, allowed), self.losses.additive(allowed), seconds=SOLVER)
        if isinstance(solution, Refusal):
            return None
        self.gap = max(self.gap, solution.gap)
        return solution

    def judged(self, picks: tuple[int, ...]) -> Planned:
        loss = self.losses.of(moves_of(self.classes, picks), "the whole plan")
        if self.least is None or loss.mean < self.least.mean:
            self.least = loss
        return Planned(picks, self.total_worth(picks), loss)

    def total_worth(self, picks: Sequence[int]) -> float:
        """Of a plan: bytes of the whole, because what two rewrites narrow is freed once; otherwise the sum of what options are worth."""
        if self.goal == "memory":
            return self.memory.saved(moves_of(self.classes, picks))
        return sum(self.worth(each.options[i]) for each, i in zip(self.classes, picks, strict=True))

    def limit(self, loss: Loss) -> float:
        """What must be within the budget: the bound of the loss, or without other data its mean."""
        return loss.mean if self.validator is None else loss.upper

    def holds(self, loss: Loss) -> bool:
        return self.limit(loss) <= self.allowed

    # Validate.

    def validated(self) -> tuple[Planned | None, Loss | None]:
        """The best plan that holds on data which nothing was chosen by. One that does not is followed by one that may lose less."""
        allowed = self.allowed
        for attempt in range(ATTEMPTS):
            plan = next((p for p in self.chosen(allowed) if p.saved > 0), None)
            if plan is None:
                break
            loss = self.validation(moves_of(self.classes, plan.picks), attempt) if self.validator is not None else plan.loss
            if self.least is None or loss.mean < self.least.mean:
                self.least = loss
            if self.holds(loss):
                return plan, loss
            self.notes.append(
                f"a plan that lost {plan.loss.mean:.3g} where it was chosen lost up to {loss.upper:.3g} elsewhere: tightened"
            )
            allowed = 0.99 * self.limit(plan.loss) * min(1.0, self.allowed / loss.upper if loss.upper > 0 else 1.0)
        return None, None

    def validation(self, moves: Sequence[Move], attempt: int) -> Loss:
        """The loss on the other half, its bound at 95 %, 97.5 %, … for the first, second, … attempt."""
        assert self.validator is not None
        self.spent.measurements += 1
        loss = self.validator.loss(self.losses.workshop.built(moves), "validation")
        if not attempt:
            return loss
        upper = upper_bound(loss.values, seed=self.validator.seed, level=1.0 - (1.0 - LEVEL) / 2**attempt)
        return Loss(loss.metric, loss.mean, upper, loss.samples, loss.values)


def own_moves(options: Sequence[Proposal]) -> list[Move]:
    return [m for o in options for m in o.moves]
