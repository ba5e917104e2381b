"""The search: measure what kinds of rewrites save and lose, solve for the best plan within the budget, measure that plan, tighten.

    measure what kinds and single options save and lose (`survey`), and the best plan of whole kinds (`coarse`)
    solve -> measure whole on the half to choose by -> scale the predicted losses by measured / predicted -> solve again
    validate the best on the other half, which nothing has seen; where it fails, tighten and try the next, at a higher confidence

Losses are predicted to add up (`losses`); the measurement of the whole has the last word. Nothing is drawn at random but by the seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from attnopt.analysis.evidence import Evidence
from attnopt.ir.site import Refusal
from attnopt.plan.judge.bound import LEVEL, upper_bound
from attnopt.plan.judge.judge import Judge
from attnopt.plan.judge.losses import Losses
from attnopt.plan.judge.quality import Loss
from attnopt.plan.memory.memory import Memory
from attnopt.plan.options.proposals import Class, Move, Proposal, exclusions_of, kinds_of, moves_of, places, ties_of, uniform
from attnopt.plan.search.coarse import measure_coarse
from attnopt.plan.search.effort import Effort, Spent
from attnopt.plan.search.knapsack import Option, Place, Problem, Solution, solve
from attnopt.plan.search.survey import measure
from attnopt.plan.timing.pricing import Prices, passes_of
from attnopt.plan.timing.stepwise import Stopwatch

ATTEMPTS = 4  # plans that are validated at most
LEAST_TRIED = 6  # plans that are measured for a budget, however late it is, while the next promises more than what holds
ENOUGH = 0.95  # of what the next plan promises: where it is late, one that holds and saves so much ends the search
NEAR = 0.85  # a plan that uses this share of the budget is not loosened further
LOOSE = 1e-3  # a factor on losses below which they keep no option out
SOLVER = 10.0  # seconds for one integer program
LOADED = 1e-12  # seconds of a call that a byte is worth: it is loaded once, at 1 GB/s, for a thousand calls
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
    until: seconds after which a plan is not tightened further. tried: what plans lost where they are chosen by; one that was made for
    another budget or goal counts for this one too. measured: seconds that whole plans were timed to save; noise: below which two are equal.
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
    spread: dict[str, dict[int, float]] = field(default_factory=dict)  # of a kind: the part of its loss that each group has
    evidence: Evidence | None = None  # on which `errors` are computed: what options lose at their sites
    errors: dict[Place, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tried: dict[tuple[int, ...], Loss] = field(default_factory=dict)
    judged_elsewhere: dict[tuple[Move, ...], Loss] = field(default_factory=dict)  # by the validator
    measured: dict[tuple[int, ...], float] = field(default_factory=dict)
    noise: float = 0.0
    wholes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of a kind: it everywhere
    rivals: dict[tuple[str, str], bool] = field(default_factory=dict)  # pairs of kinds that are alternatives (`coarse`)
    until: float | None = None
    least: Loss | None = None  # the smallest loss of any plan that was measured
    gap: float = 0.0

    def found(self) -> tuple[Planned | None, Loss | None]:
        """The best plan that holds the budget, with its validated loss; None where no plan does."""
        if not self.kinds:
            return None, None
        measure(self)
        return self.validated()

    @property
    def kinds(self) -> list[str]:
        return list(self.counts)

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Every kind, and how many groups it is offered to."""
        return kinds_of(self.classes)

    def whole(self, kind: str) -> tuple[int, ...]:
        """The picks of a kind everywhere."""
        if kind not in self.wholes:
            self.wholes[kind] = uniform(self.classes, kind)
        return self.wholes[kind]

    def passes_of(self, kind: str) -> tuple[str, ...]:
        """The names of the passes that a kind is made by."""
        return self.makers[kind]

    @cached_property
    def makers(self) -> Mapping[str, tuple[str, ...]]:
        return {o.kind: passes_of(o) for _, o in places(self.classes) if o.moves}

    @cached_property
    def bonds(self) -> tuple[tuple[tuple[Place, ...], ...], tuple[tuple[Place, Place], ...]]:
        """Ties and exclusions."""
        return ties_of(self.classes), exclusions_of(self.classes)

    # Choose.

    def worth(self, option: Proposal) -> float:
        if self.goal == "everything":
            return EVERYTHING * len(option.moves)
        saved = self.memory.saved(option.moves)
        return saved if self.goal == "memory" else self.prices.saved(option) + LOADED * saved

    def predicted(self, place: tuple[int, int]) -> float:
        """The additive loss of an option: its own, else its part of what its kind loses everywhere."""
        option = self.classes[place[0]].options[place[1]]
        if not option.moves:
            return 0.0
        if place in self.alone:
            return self.losses.additive(self.alone[place].mean)
        part = self.spread.get(option.kind, {}).get(place[0], 1.0 / self.counts[option.kind])
        return self.losses.additive(self.everywhere[option.kind].mean) * part

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
        """Plans that lose no more where they were chosen by, best first: solved for and tightened, and whole kinds."""
        measure_coarse(self, allowed)
        scales, solved = Bracket(), dict[tuple[int, ...], Planned]()
        until = 2 * self.effort.seconds if self.until is None else self.until
        for _ in range(self.effort.rounds):
            solution = self.solved(scales.guess, allowed)
            if solution is None or not any(solution.picks):
                scales.told(True)
            elif solution.picks in solved:
                scales.told(self.limit(solved[solution.picks].loss) <= allowed)
            else:
                late = self.spent.seconds > until
                if late and (len(solved) >= LEAST_TRIED or self.promises_little(solution.picks, allowed)):
                    break
                plan = solved[solution.picks] = self.judged(solution.picks)
                measured, predicted = self.losses.additive(self.limit(plan.loss)), solution.loss / scales.guess
                holds = self.limit(plan.loss) <= allowed
                scales.told(holds, measured / predicted if predicted > 0 else None)
                if holds and self.limit(plan.loss) >= NEAR * allowed:
                    break
            if scales.closed:
                break
        return self.holding(allowed)

    def holding(self, allowed: float) -> list[Planned]:
        """The plans that were measured and lose no more where they were chosen by, best first; of those as fast, what loses least."""
        known = {self.whole(kind): loss for kind, loss in self.everywhere.items()} | self.tried
        held = [Planned(p, self.total_worth(p), loss) for p, loss in known.items() if any(p) and self.limit(loss) <= allowed]
        held.sort(key=lambda p: (-p.saved, p.picks))
        even = [p for p in held if p.saved >= held[0].saved - self.noise and {p.picks, held[0].picks} <= self.measured.keys()]
        return sorted(even, key=lambda p: p.loss.mean) + [p for p in held if p not in even]

    def promises_little(self, picks: tuple[int, ...], allowed: float) -> bool:
        """Whether a plan that holds saves about as much as these picks are predicted to."""
        return any(p.saved >= ENOUGH * self.total_worth(picks) for p in self.holding(allowed)[:1])

    def solved(self, scale: float, allowed: float) -> Solution | None:
        solution = solve(self.problem(scale, allowed), self.losses.additive(allowed), seconds=SOLVER)
        if isinstance(solution, Refusal):
            return None
        self.gap = max(self.gap, solution.gap)
        return solution

    def judged(self, picks: tuple[int, ...]) -> Planned:
        loss = self.tried[picks] = self.losses.of(moves_of(self.classes, picks), "the whole plan")
        if self.least is None or loss.mean < self.least.mean:
            self.least = loss
        return Planned(picks, self.total_worth(picks), loss)

    def total_worth(self, picks: tuple[int, ...]) -> float:
        """Of a plan: as it was timed; bytes of the whole, because what two rewrites narrow is freed once; else the sum over options."""
        if self.goal == "time" and picks in self.measured:
            return self.measured[picks]
        if self.goal == "memory":
            return self.memory.saved(moves_of(self.classes, picks))
        return sum(self.worth(each.options[i]) for each, i in zip(self.classes, picks, strict=True))

    def limit(self, loss: Loss) -> float:
        """What must be within the budget: the bound of the loss, or without other data its mean."""
        return loss.mean if self.validator is None else loss.upper

    def holds(self, loss: Loss, budget: float | None = None) -> bool:
        return self.limit(loss) <= (self.allowed if budget is None else budget)

    # Validate.

    def validated(self, budget: float | None = None) -> tuple[Planned | None, Loss | None]:
        """The best plan that holds on data which nothing was chosen by. One that does not is followed by one that may lose less."""
        budget = allowed = self.allowed if budget is None else budget
        for attempt in range(ATTEMPTS):
            plan = next((p for p in self.chosen(allowed) if p.saved > 0), None)
            if plan is None:
                break
            loss = self.validation(moves_of(self.classes, plan.picks), attempt) if self.validator is not None else plan.loss
            if self.least is None or loss.mean < self.least.mean:
                self.least = loss
            if self.holds(loss, budget):
                return plan, loss
            self.notes.append(
                f"a plan that lost {plan.loss.mean:.3g} where it was chosen lost up to {loss.upper:.3g} elsewhere: tightened"
            )
            allowed = 0.99 * self.limit(plan.loss) * min(1.0, budget / loss.upper if loss.upper > 0 else 1.0)
        return None, None

    def validation(self, moves: Sequence[Move], attempt: int) -> Loss:
        """The loss on the other half, its bound at 95 %, 97.5 %, … for the first, second, … attempt."""
        assert self.validator is not None
        key = tuple(moves)
        if key not in self.judged_elsewhere:
            self.spent.measurements += 1
            self.judged_elsewhere[key] = self.validator.loss(self.losses.workshop.built(moves), "validation")
        loss = self.judged_elsewhere[key]
        if not attempt:
            return loss
        upper = upper_bound(loss.values, seed=self.validator.seed, level=1.0 - (1.0 - LEVEL) / 2**attempt)
        return Loss(loss.metric, loss.mean, upper, loss.samples, loss.values)
