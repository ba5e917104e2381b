"""Sweep the budget: the best plans for time and for memory, each measured on data that did not choose it.

budgets 0.0003 … 0.1  ->  plans  ->  Frontier(points), the exact plan first; and each kind of rewrite everywhere, to compare
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnopt.analysis.progress import progress
from attnopt.cost.nodes import estimate_nodes
from attnopt.plan.budgeted import UNSEEN, Setting, prepared
from attnopt.plan.proposals import Move, moves_of, uniform
from attnopt.plan.replay import step_of
from attnopt.plan.search import Search
from attnopt.report.frontier import Frontier, Point
from attnopt.report.plan import Plan

BUDGETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)


def explored(setting: Setting, model: str, budgets: Sequence[float] = BUDGETS) -> Frontier:
    """The frontier of one model. setting.budget allows the largest of the budgets."""
    search = prepared(setting)
    search.measure_kinds()
    search.measure_options()
    plans: dict[tuple[int, ...], tuple[str, float | None]] = {}
    for kind in search.kinds:
        plans.setdefault(uniform(search.classes, kind), (f"{kind} everywhere", None))
    for allowed in progress(list(budgets), "budgets"):
        for goal in ("time", "memory"):
            search.goal = goal
            found = search.chosen(allowed)
            if found and found[0].saved > 0:
                plans.setdefault(found[0].picks, (f"budget {allowed:g}, {goal}", allowed))
    points = [point(search, setting, "exact", None, (0,) * len(search.classes))]
    for picks, (name, budget) in progress(list(plans.items()), "plans"):
        points.append(point(search, setting, name, budget, picks))
    points.sort(key=lambda p: (p.loss, p.seconds))
    spent = search.spent
    said = f"effort {setting.effort.name}, seed {setting.seed}: {spent.measurements} measurements in {spent.seconds:.0f} s"
    notes = (*search.notes, *(() if setting.data is not None else (UNSEEN,)))
    name = search.losses.judge.metric.name
    return Frontier(model, setting.target.name, name, tuple(replace(p, best=not beaten(p, points)) for p in points), said, notes)


def point(search: Search, setting: Setting, name: str, budget: float | None, picks: Sequence[int]) -> Point:
    """One plan, measured: its loss on the data held back, its time beside the exact plan."""
    moves = moves_of(search.classes, picks)
    options = [each.options[i] for each, i in zip(search.classes, picks, strict=True)]
    loss = search.losses.of(moves)
    if search.validator is not None and moves:
        loss = search.validation(moves, 0)
    seconds = predicted_seconds(setting, search) - sum(search.prices.saved(o) for o in options)
    if search.stopwatch is not None:
        runners = {"before": search.stopwatch.exact}
        runners |= {"after": search.losses.workshop.built(moves).runner()} if moves else {}
        seconds = search.stopwatch.times(runners)["after" if moves else "before"].median
    held = search.memory.after(moves)
    kernels = {c.site.name: c.lowering.name for c in setting.chosen if c.lowering is not None}
    bound = None if search.validator is None else loss.upper
    allowed = 0.0 if budget is None else budget
    plan = Plan(
        setting.host.kind,
        setting.target.name,
        setting.runtime,
        kernels,
        tuple(map(step_of, moves)),
        allowed,
        loss.metric,
        loss.mean,
        bound,
    )
    return Point(
        name, budget, loss.mean, bound, seconds, held.weights, held.cache, counted(moves), plan, search.stopwatch is not None
    )


def predicted_seconds(setting: Setting, search: Search) -> float:
    """Of the exact plan: every node outside of attentions with a kernel, and these kernels."""
    shop, held = search.losses.workshop, {c.site.name: c.lowering for c in setting.chosen if c.lowering is not None}
    inside = {id(n) for s in setting.sites if s.name in held for n in s.nodes}
    nodes = [n for n in setting.host.graph.nodes if id(n) not in inside]
    rest = estimate_nodes(nodes, shop.sizes, setting.target, runtime=setting.runtime).seconds
    return rest + sum(shop.seconds(s, held[s.name].name) for s in setting.sites if s.name in held)


def counted(moves: Sequence[Move]) -> str:
    counts: dict[str, int] = {}
    for move in moves:
        kind = f"{move.candidate.pass_name}: {move.candidate.kind}"
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{kind} ({n})" for kind, n in counts.items()) or "none"


def beaten(point: Point, points: Sequence[Point]) -> bool:
    """Whether another loses no more and is both as fast and as small, and better in something."""

    def cost(p: Point) -> tuple[float, float, float]:
        return p.loss, p.seconds, p.memory

    return any(all(a <= b for a, b in zip(cost(p), cost(point), strict=True)) and cost(p) != cost(point) for p in points)
