"""Sweep the budget: the best plans for time and for memory, each held to its budget on data that did not choose it.

budgets 0.0001 … 0.1, and those that a kind of rewrite everywhere just holds  ->  plans, timed beside the original and validated
                                                                               ->  Frontier(points), the exact plan first

A point makes the promise of `optimize`: the one-sided 95 % bound of its loss on the data held back is within its budget. Where no plan
of its own holds, or none is better than what a smaller budget has, it is the plan of the smaller budget: time never rises with the
budget. Every time is a share of the original's, which ran in turn with it: the model as it was given, before weights were folded. Folds
that save time are the first steps of each plan. Each kind of rewrite everywhere is there to compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from attnopt.analysis.progress import progress
from attnopt.cost.nodes import estimate_nodes
from attnopt.patterns import recognise
from attnopt.plan.budgeted import UNSEEN, Setting, halves, prepared
from attnopt.plan.judge.quality import Loss
from attnopt.plan.options.proposals import Move, moves_of
from attnopt.plan.pipeline import SLOWER
from attnopt.plan.replay import step_of
from attnopt.plan.search.search import Planned, Search
from attnopt.plan.search.survey import measure
from attnopt.plan.timing.predict import ONE_NODE, SPELLED_OUT
from attnopt.report.frontier import Frontier, Point
from attnopt.report.plan import Plan

SWEEP = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the largest budget
NATURAL = 4  # budgets besides, at which one kind of rewrite everywhere just holds: what is chosen by hand has its rival there
FASTEST = 4  # plans for each budget that are timed at most, until the best of all is one that was
EVEN = 0.015  # of the original's time: plans that were timed and differ by less are as fast, and what loses less is better
LONGER = 2.5  # times as long as kinds are timed
Picks = tuple[int, ...]


def explored(setting: Setting, model: str, budgets: Sequence[float] | None = None) -> Frontier:
    """The frontier of one model. budgets: rising; default: parts of that of the setting, which is the largest, and natural ones."""
    search = prepared(setting)
    measure(search)
    bench = Bench(setting, search)
    exact = bench.exact()
    known = [kind for kind in search.kinds if search.everywhere[kind].samples]
    whole = {kind: bench.everywhere(kind) for kind in progress(known, "kinds everywhere")}
    parts = [float(f"{share * setting.budget.allowed:.9g}") for share in SWEEP]
    wanted = {"time": budgets or {*parts, *natural(search, whole)}, "memory": budgets or parts}
    points = [exact, *whole.values()]
    for goal, allowed in wanted.items():
        search.goal = goal
        points += bench.swept(exact, sorted(allowed), goal)
    points.sort(key=lambda p: (p.loss, p.seconds, p.budget or 0.0))
    spent = search.spent
    said = f"effort {setting.effort.name}, seed {setting.seed}: {spent.measurements} measurements in {spent.seconds:.0f} s"
    notes = (*search.notes, *(() if setting.data is not None else (UNSEEN,)))
    name = search.losses.judge.metric.name
    marked = tuple(replace(p, best=not beaten(p, points)) for p in points)
    return Frontier(model, setting.target.name, name, marked, said, notes, bench.original)


def natural(search: Search, whole: Mapping[str, Point]) -> list[float]:
    """What the fastest kinds lose that no other kind beats, up to the largest budget: each itself holds there, and has a rival."""
    losses = {kind: max(p.bound or p.loss, search.limit(search.everywhere[kind])) for kind, p in whole.items()}
    held = [kind for kind, loss in losses.items() if 0 < loss <= search.allowed and whole[kind].share < 1]
    costs = {kind: (losses[kind], whole[kind].share) for kind in held}
    best = [a for a in held if not any(b != costs[a] and b[0] <= costs[a][0] and b[1] <= costs[a][1] for b in costs.values())]
    return [float(f"{1.01 * losses[kind]:.3g}") for kind in sorted(best, key=lambda kind: whole[kind].share)[:NATURAL]]


@dataclass
class Bench:
    """Plans of one search beside the original. shares: of its time, by the plan; original: its seconds."""

    setting: Setting
    search: Search
    shares: dict[Picks, float] = field(default_factory=dict)
    original: float = 0.0

    def __post_init__(self) -> None:
        given = self.setting.given or self.setting.host
        self.run, self.data = self.setting.own or given.runner(), halves(self.setting)[0].fingerprint
        if self.search.stopwatch is None:
            self.original = predicted_seconds(self.setting, self.search, exact=False)

    def share(self, picks: Picks) -> float:
        """Of the original's time: measured in turn with it, else predicted."""
        if picks not in self.shares:
            self.shares[picks] = self.predicted(picks) if self.search.stopwatch is None else self.measured(picks)
            if any(picks) and self.search.stopwatch is not None:
                nothing = (0,) * len(picks)
                self.search.measured[picks] = (self.share(nothing) - self.shares[picks]) * self.original
        return self.shares[picks]

    def measured(self, picks: Picks) -> float:
        watch = self.search.stopwatch
        assert watch is not None
        after = self.search.losses.workshop.built(moves_of(self.search.classes, picks)).runner() if any(picks) else watch.exact
        times = watch.times({"before": self.run, "after": after}, LONGER)
        self.original = self.original or times["before"].median
        self.search.noise = EVEN * self.original
        return times["after"].ratio(times["before"])

    def predicted(self, picks: Picks) -> float:
        options = [each.options[i] for each, i in zip(self.search.classes, picks, strict=True)]
        exact = predicted_seconds(self.setting, self.search)
        return max(exact - sum(self.search.prices.saved(o) for o in options), 0.0) / self.original

    def exact(self) -> Point:
        """The exact plan; the original where its kernels measure slower in the whole model, as `optimize` would roll it back."""
        found = self.point("exact", None, (0,) * len(self.search.classes), self.search.losses.of(()))
        if not found.timed or found.share <= SLOWER:
            return found
        what, given = "folds and kernels" if self.setting.folds else "kernels", self.setting.given or self.setting.host
        note = f"its {what} take {found.share:.2f} of the original's time, which is kept"
        weights = replace(self.search.memory, graph=given.graph, known={}).weights
        plan = replace(found.plan, kernels={}, steps=())
        return replace(found, share=1.0, seconds=self.original, weights=weights, plan=plan, rewrites="none", note=note)

    def swept(self, exact: Point, budgets: Sequence[float], goal: str) -> list[Point]:
        """A point for each budget, none behind that of a smaller one."""
        made, best = list[Point](), exact
        for allowed in progress(list(budgets), f"budgets, least {goal}"):
            name, already = f"budget {allowed:g}, {goal}", len(self.search.notes)
            plan, loss = self.found(allowed, goal)
            notes = self.search.notes[already:]
            del self.search.notes[already:]
            own = None if plan is None or loss is None else self.point(name, allowed, plan.picks, loss, "; ".join(notes))
            if own is not None and cost(own, goal) < cost(best, goal):
                made.append(own)
            else:
                why = (
                    "no plan of its own held" if own is None else f"its own plan is no better ({said(own, goal, self.original)})"
                )
                as_before = (*notes, f"as '{best.name}': {why}")
                renamed = replace(best.plan, budget=allowed)
                made.append(replace(best, name=name, budget=allowed, goal=goal, plan=renamed, note="; ".join(as_before)))
            best = replace(made[-1], name=best.name if made[-1].plan.steps == best.plan.steps else name)
        return [replace(p, goal=goal) for p in made]

    def found(self, allowed: float, goal: str) -> tuple[Planned | None, Loss | None]:
        """The best plan for a budget that holds on the data held back; the fastest by the clock of those that are predicted to be."""
        search = self.search
        search.until = search.spent.seconds + search.effort.seconds / (2 * len(SWEEP))
        if goal == "time" and search.stopwatch is not None:
            plans = search.chosen(allowed)
            for _ in range(FASTEST if plans else 0):
                best = max(plans, key=lambda p: search.total_worth(p.picks))
                if best.picks in self.shares:
                    break
                self.share(best.picks)
        return search.validated(allowed)

    def everywhere(self, kind: str) -> Point:
        """One kind of rewrite in all places, whatever it loses."""
        picks = self.search.whole(kind)
        moves = moves_of(self.search.classes, picks)
        loss = self.search.everywhere[kind] if self.search.validator is None else self.search.validation(moves, 0)
        return self.point(f"{kind} everywhere", None, picks, loss)

    def point(self, name: str, budget: float | None, picks: Picks, loss: Loss, note: str = "") -> Point:
        search, setting = self.search, self.setting
        moves = moves_of(search.classes, picks)
        share = self.share(picks)
        held = search.memory.after(moves)
        bound = None if search.validator is None else loss.upper
        plan = Plan(
            host=setting.host.kind,
            target=setting.target.name,
            runtime=setting.runtime,
            kernels={c.site.name: c.lowering.name for c in setting.chosen if c.lowering is not None},
            steps=tuple(map(step_of, (*setting.folds, *search.losses.workshop.arrays.ready(moves)))),
            seed=setting.seed,
            data=self.data,
            budget=budget or 0.0,
            metric=loss.metric,
            loss=loss.mean,
            bound=bound,
        )
        timed = search.stopwatch is not None
        seconds, said = share * self.original, counted((*setting.folds, *moves))
        return Point(name, budget, loss.mean, bound, seconds, held.weights, held.cache, said, plan, timed, share=share, note=note)


def cost(point: Point, goal: str) -> float:
    return point.memory if goal == "memory" else point.seconds


def said(point: Point, goal: str, original: float) -> str:
    if goal == "memory":
        return f"{point.memory / 1e6:.3g} MB"
    return f"{point.seconds / original:.3f} of the original's time"


def predicted_seconds(setting: Setting, search: Search, *, exact: bool = True) -> float:
    """Every node outside of attentions, and these by their kernels: those of the exact plan, or of the original."""
    shop, held = search.losses.workshop, {c.site.name: c.lowering for c in setting.chosen if exact and c.lowering is not None}
    host = setting.host if exact or setting.given is None else setting.given
    sites = setting.sites if host is setting.host else recognise(host.graph).sites
    inside = {id(n) for s in sites for n in s.nodes}
    nodes = [n for n in host.graph.nodes if id(n) not in inside]
    total = 0.0
    for load in search.prices.loads:
        total += load.weight * estimate_nodes(nodes, load.sizes, setting.target, runtime=setting.runtime).seconds
        for s in sites:
            before = (ONE_NODE if any(n.op == "attention" for n in s.nodes) else SPELLED_OUT)[setting.host.kind]
            total += load.weight * shop.seconds(s, held[s.name].name if s.name in held else before, load.sizes)
    return total


def counted(moves: Sequence[Move]) -> str:
    counts: dict[str, int] = {}
    for move in moves:
        kind = f"{move.candidate.pass_name}: {move.candidate.kind}"
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{kind} ({n})" for kind, n in counts.items()) or "none"


def beaten(point: Point, points: Sequence[Point]) -> bool:
    """Whether another loses no more and is both as fast and as small, and better in something."""

    def costs(p: Point) -> tuple[float, float, float]:
        return p.loss, p.seconds, p.memory

    return any(all(a <= b for a, b in zip(costs(p), costs(point), strict=True)) and costs(p) != costs(point) for p in points)
