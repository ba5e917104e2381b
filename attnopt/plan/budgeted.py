"""From a budget to a plan: data cut in two, evidence, options of all passes, the search, the check of each step, the report.

    Setting(host, current, chosen, …)  ->  Outcome(host, moves, loss, reports)

A budget that nothing meets gives the exact plan, and the outcome says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.analysis.store import Store
from attnopt.analysis.sweep import MEMORY as SWEEP
from attnopt.cost.target import Target
from attnopt.cost.workload import Workload
from attnopt.ir.site import Host, Site
from attnopt.passes import Pass
from attnopt.passes.candidate import FITTED
from attnopt.plan.arrays import MEMORY as CODES
from attnopt.plan.arrays import Arrays
from attnopt.plan.choose import Chosen
from attnopt.plan.judge.budget import Budget
from attnopt.plan.judge.judge import MEMORY as OUTPUTS
from attnopt.plan.judge.judge import Judge
from attnopt.plan.judge.losses import Losses
from attnopt.plan.judge.quality import Loss, Score
from attnopt.plan.judge.verify import OwnModel
from attnopt.plan.memory.memory import Held, Memory
from attnopt.plan.memory.room import Room
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.offered import Takes, offered
from attnopt.plan.options.proposals import LATE, Class, Move, classes_of, moves_of
from attnopt.plan.options.tuning import Tuning
from attnopt.plan.options.workshop import Workshop
from attnopt.plan.search.effort import Effort, Spent
from attnopt.plan.search.explain import explained
from attnopt.plan.search.roll_back import Check, units_of
from attnopt.plan.search.search import Planned, Search
from attnopt.plan.search.smaller import Smaller
from attnopt.plan.timing.pricing import Load, Prices
from attnopt.plan.timing.shaped import Shaped
from attnopt.plan.timing.stepwise import Stopwatch
from attnopt.plan.worthwhile import worthwhile
from attnopt.report.data import RewriteReport
from attnopt.report.search import SearchReport, StepReport

UNTIMED = "at the shapes that were given times are predicted, not measured, and kernels are those chosen on the example inputs: "
UNSEEN = "no calibration data were given: the loss was chosen and judged by the example inputs, and holds for them alone"


@dataclass(frozen=True)
class Setting:
    """What a search is given. data: calibration given by the user, None where there are only the example inputs.

    shaped: inputs of the workload's shapes, to time models on. minimise: of search.GOALS. own: the model that `host` was traced from,
    which a frontier's times are shares of. given: the model before `folds`, where there are any: `host` is what they left. takes: see
    `options.offered`.
    """

    host: Host
    current: Host
    sites: Sequence[Site]
    chosen: Sequence[Chosen]
    passes: Sequence[Pass]
    inputs: Mapping[str, Tensor]
    data: Calibration | None
    budget: Budget
    target: Target
    runtime: str
    opset: int
    select: str
    effort: Effort
    seed: int = 0
    names: Sequence[str] = ()
    quality: Score | None = None
    workload: Workload | None = None
    shaped: Shaped = Shaped(())
    store: Store = field(default_factory=Store)
    minimise: str = "time"
    own: OwnModel | None = None
    given: Host | None = None
    folds: tuple[Move, ...] = ()
    takes: Takes | None = None


@dataclass(frozen=True)
class Outcome:
    """The host after the plan (the current one where none held), its moves, the records, and what it holds before and after.

    data: the fingerprint of the half that it was chosen by.
    """

    host: Host
    moves: tuple[Move, ...]
    rewrites: tuple[RewriteReport, ...]
    search: SearchReport
    memory: tuple[Held, Held]
    notes: tuple[str, ...] = ()
    data: str = ""


def prepared(setting: Setting) -> Search:
    """The search with everything that it needs, before it has measured anything."""
    spent = Spent(setting.effort)
    room = Room(setting.host.graph, setting.chosen, spent)
    choose, validate = (None if half is None else room.in_pieces(half) for half in halves(setting))
    assert choose is not None
    evidence = Evidence(setting.host, choose, sites=setting.sites, store=setting.store, memory=room.share(SWEEP))
    grouping = Grouping(setting.host, tuple(setting.sites))
    classes, notes = proposed(setting, grouping, evidence, spent)
    sizes = setting.host.graph.sizes(setting.inputs)
    kernels = {c.site.name: c.lowering for c in setting.chosen if c.lowering is not None}
    arrays = Arrays(evidence, room.share(CODES))
    shop = Workshop(setting.host, kernels, setting.target, setting.runtime, setting.opset, sizes, arrays)
    classes = offered(classes, shop, setting.takes)
    bound = setting.workload.bind(setting.sites) if setting.workload is not None else ()
    loads = [Load({**sizes, **b.sizes}, b.weight) for b in bound] or [Load(sizes)]
    pairs = tuple(zip(grouping.sites, grouping.blocks, strict=True))
    memory = Memory(setting.host.graph, pairs, [load.sizes for load in loads])
    judged = {"names": setting.names, "quality": setting.quality, "seed": setting.seed, "memory": room.share(OUTPUTS)}
    judge = Judge(setting.host, choose, setting.budget, **judged)  # type: ignore[arg-type]
    validator = None if validate is None else Judge(setting.host, validate, setting.budget, **judged)  # type: ignore[arg-type]
    kept = setting.store.folder is not None and setting.quality is None  # a user's function has no key
    contents = evidence.key("loss", judge.metric.name, setting.runtime, str(sorted(kernels))) if kept else ""
    needs = max(room.needs(data) for data in (choose, validate) if data is not None)
    losses = Losses(judge, shop, spent, setting.store, contents, needs)
    given = [(1.0, setting.inputs)] if setting.workload is None else setting.shaped.loads
    measures = setting.select == "measure" and setting.minimise == "time"
    watch = Stopwatch(setting.current.runner(), given, spent) if measures and given else None
    notes += [UNTIMED + setting.shaped.why] if measures and not given else []
    goal = "everything" if setting.select == "always" and setting.minimise == "time" else setting.minimise
    allowed = setting.budget.allowed
    prices = Prices(shop, loads)
    return Search(
        classes, prices, memory, losses, validator, allowed, setting.effort, spent, watch, goal, notes=notes, evidence=evidence
    )


def proposed(setting: Setting, grouping: Grouping, evidence: Evidence, spent: Spent) -> tuple[list[Class], list[str]]:
    """(classes, notes): what passes propose, in a share of the time; what evidence saw fewer data for it is said."""

    def late() -> bool:
        return spent.seconds > setting.effort.proposing * setting.effort.seconds

    with evidence.bounded(late) as cut:
        classes = classes_of(grouping, setting.passes, evidence, Tuning(spent, setting.data is not None, setting.seed), late)
    without = {name for each in classes for name, why in each.refusals if why.reason.startswith(LATE)}
    notes = (
        [f"evidence was gathered on a part of the data, {', '.join(cut)}: time was up, a higher effort has more"] if cut else []
    )
    return classes, notes + [f"{', '.join(sorted(without))}: {LATE}"] * bool(without)


def halves(setting: Setting) -> tuple[Calibration, Calibration | None]:
    """(to choose by, to validate by); without calibration data the example inputs, and nothing."""
    if setting.data is not None:
        return setting.data.split(setting.seed)
    return Calibration.of(setting.host.graph, [setting.inputs]), None


def under_budget(setting: Setting) -> Outcome:
    """The fastest plan within the budget (or that of least memory), validated; where times count, its steps are checked one by one.

    Never changes the hosts of the setting.
    """
    search = prepared(setting)
    if search.stopwatch is not None:
        search.classes = worthwhile(search.classes, search.prices)
    plan, loss = search.found()
    steps: Sequence[StepReport] = ()
    moves = () if plan is None else moves_of(search.classes, plan.picks)
    if plan is not None and search.stopwatch is not None:
        steps, moves, loss = verified(search, plan, loss)
    if search.stopwatch is not None:
        plan, steps, moves, loss = made_smaller(search, plan, steps, moves, loss)
    result = search.losses.workshop.built(moves) if moves else setting.current
    notes = [*search.notes, *([] if setting.data is not None else [UNSEEN])]
    if setting.store.failure:
        notes.append(setting.store.failure)
    notes += recovered(search)
    if not moves and search.kinds:
        least = "" if search.least is None else f"; the least that any plan lost is {search.least}"
        notes.append(f"no approximate plan that saves anything is within the budget {setting.budget}{least}: the plan is exact")
    held = search.memory.after(), search.memory.after(moves)
    record = searched(search, setting, plan, moves, loss, steps)
    ready = search.losses.workshop.arrays.ready(moves)
    data, about = halves(setting)[0].fingerprint, rewrites(search, setting.passes, moves, loss)
    return Outcome(result, ready, about, record, held, tuple(notes), data)


def recovered(search: Search) -> list[str]:
    """What tuning gave: kinds that were measured everywhere both with and without it."""
    said = []
    for kind in search.kinds:
        plain, tuned = (search.everywhere.get(name) for name in (kind.removesuffix(FITTED), kind))
        if plain is None or tuned is None or not kind.endswith(FITTED) or not plain.samples == tuned.samples > 0:
            continue
        if plain.mean > 0:
            share = 1 - tuned.mean / plain.mean
            what = f"{share:.0%} of it recovered" if share > 0 else "nothing recovered"
            said.append(f"tuned, {kind.removesuffix(FITTED)} everywhere loses {plain.mean:.3g} -> {tuned.mean:.3g}: {what}")
    return said


def verified(search: Search, plan: Planned, loss: Loss | None) -> tuple[Sequence[StepReport], tuple[Move, ...], Loss | None]:
    """The steps of the plan as they were checked, the moves that stay, and their loss; none where what is left does not hold."""
    assert search.stopwatch is not None
    moves = moves_of(search.classes, plan.picks)
    check = Check(moves, search.stopwatch, search.losses, search.allowed)
    check.run(units_of(search.classes, plan.picks, search.worth))
    if not check.kept or len(check.kept) == len(moves):
        return check.steps, check.kept, loss if check.kept else None
    again = search.losses.of(check.kept) if search.validator is None else search.validation(check.kept, 0)
    return (check.steps, check.kept, again) if search.holds(again) else (check.steps, (), None)


def made_smaller(
    search: Search, plan: Planned | None, steps: Sequence[StepReport], moves: tuple[Move, ...], loss: Loss | None
) -> tuple[Planned | None, Sequence[StepReport], tuple[Move, ...], Loss | None]:
    """(plan, steps, moves, loss) with what costs no time and makes the model smaller, where the budget has room for it."""
    picks = (0,) * len(search.classes) if plan is None else plan.picks
    undone = frozenset((step.kind, name) for step in steps if not step.kept for name in step.names)
    made = Smaller(search, picks, moves, loss, undone).run()
    if made.loss is not None and made.kept != moves:
        plan = Planned(made.picks, search.total_worth(made.picks), made.loss)
    return plan, (*steps, *made.steps), made.kept, made.loss


def rewrites(search: Search, passes: Sequence[Pass], moves: Sequence[Move], loss: Loss | None) -> tuple[RewriteReport, ...]:
    """One line for each pass: what was taken of it, or the first reason why not."""
    made = []
    for rewrite in passes:
        own = [m for m in moves if m.rewrite is rewrite]
        offered = [m for each in search.classes for o in each.options for m in o.moves if m.rewrite is rewrite]
        groups = len({m.group.name for m in offered})
        if not offered:
            reasons = [r.reason for each in search.classes for name, r in each.refusals if name == rewrite.name]
            made.append(RewriteReport(rewrite.name, "nothing proposed", False, next(iter(reasons), "no group to look at")))
            continue
        counts: dict[str, int] = {}
        for move in own:
            counts[move.candidate.kind] = counts.get(move.candidate.kind, 0) + 1
        said = ", ".join(f"{kind} ({count})" for kind, count in counts.items()) or "nothing"
        metric, budget = search.losses.judge.metric.name, search.allowed
        kinds = {o.kind for each in search.classes for o in each.options if any(m.rewrite is rewrite for m in o.moves)}
        least = min(
            (x for kind, x in search.everywhere.items() if kind in kinds and x.samples), key=lambda x: x.mean, default=None
        )
        found = loss if own else least
        why = (
            f"{loss}, within the budget {budget:g}"
            if own and loss is not None
            else "what it loses was not measured: time was up, or it did not run: see the groups"
            if least is None
            else f"everywhere it loses {least}: see the groups"
        )
        made.append(
            RewriteReport(
                rewrite.name,
                f"{len(own)} of {groups} groups: {said}",
                bool(own),
                why,
                metric,
                found.mean if found else None,
                budget,
            )
        )
    return tuple(made)


def searched(
    search: Search, setting: Setting, plan: Planned | None, moves: Sequence[Move], loss: Loss | None, steps: Sequence[StepReport]
) -> SearchReport:
    counts = (search.losses.judge.calibration.samples, 0 if search.validator is None else search.validator.calibration.samples)
    return SearchReport(
        effort=setting.effort.name,
        seed=setting.seed,
        seconds=search.spent.seconds,
        measurements=search.spent.measurements,
        remembered=search.spent.remembered,
        peak_memory=search.spent.peak_memory,
        memory_limit=search.spent.memory_limit,
        gap=search.gap,
        samples=counts,
        loss=None if loss is None else loss.mean,
        bound=None if loss is None or search.validator is None else loss.upper,
        metric=search.losses.judge.metric.name,
        groups=explained(search, None if plan is None else plan.picks, moves, steps),
        steps=tuple(steps),
    )
