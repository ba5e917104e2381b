"""The story of one optimisation, step by step.

recognise -> fold weights -> propose -> choose kernels -> apply -> verify -> search under the budget -> time -> roll back if slower
-> record the plan
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.store import Store
from attnopt.cost.target import load_target
from attnopt.cost.workload import Workload
from attnopt.errors import PlanError
from attnopt.ir.site import Host, Refusal, Site
from attnopt.passes import ALL, Group, Pass
from attnopt.patterns import Recognition, recognise
from attnopt.plan.budgeted import UNTIMED, Outcome, Setting, under_budget
from attnopt.plan.choose import Chosen, apply_choices, choose
from attnopt.plan.folding import Folded, Folding, again, fold_steps, is_fold
from attnopt.plan.judge.budget import QUALITY, Budget
from attnopt.plan.judge.quality import Score
from attnopt.plan.judge.verify import OwnModel, difference, require_equal, require_same_model, seeded
from attnopt.plan.memory.fitting import left, within_memory
from attnopt.plan.options.offered import Takes
from attnopt.plan.options.proposals import Move
from attnopt.plan.options.workshop import Workshop
from attnopt.plan.replay import arrays_for, kernels_from, moves_from, step_of
from attnopt.plan.search.effort import EFFORTS, Effort
from attnopt.plan.site_reports import site_reports
from attnopt.plan.timing.shaped import Shaped, shaped
from attnopt.plan.timing.stepwise import summed
from attnopt.plan.timing.timing import counted, in_turn
from attnopt.report.data import Difference, Report, RewriteReport
from attnopt.report.plan import Plan
from attnopt.report.table import megabytes

SLOWER = 1.05  # a whole model that measures slower than this share of the original is rolled back


@dataclass(frozen=True)
class Request:
    """What the user asked for. `inputs` are named example tensors; `calibration` what losses are measured on, where data were given.

    names: of the outputs. quality: the user's score, for a budget in it. plan: applied as it is, without a search. shaped: inputs of
    the workload's shapes, once they are made.
    minimise: "time", or "memory" (weights and caches), for which a slower model is kept. own: the model itself, where `host` was traced
    from it: what is timed as before. takes: see `options.offered`. named: the user said which passes, and is told of each.
    """

    target: str
    runtime: str
    opset: int
    select: str
    budget: Budget = field(default_factory=Budget)
    passes: tuple[Pass, ...] = ALL
    inputs: Mapping[str, Tensor] | None = None
    calibration: Calibration | None = None
    names: tuple[str, ...] = ()
    quality: Score | None = None
    effort: Effort = EFFORTS["low"]
    seed: int = 0
    workload: Workload | None = None
    store: Store = field(default_factory=Store)
    plan: Plan | None = None
    shaped: Shaped = Shaped(())
    minimise: str = "time"
    own: OwnModel | None = None
    takes: Takes | None = None
    named: bool = False


@dataclass
class Clock:
    """Seconds spent per step, for the report."""

    spent: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - started


@dataclass
class State:
    """Where the story stands: the model as given, the result, what was chosen for sites, what was moved, and what is to be reported.

    folded: the exact rewrites that came first; kernels and moves are of the model after them.
    """

    original: Host
    result: Host
    chosen: list[Chosen]
    folded: Folded
    moves: tuple[Move, ...] = ()
    exact: Difference | None = None
    outcome: Outcome | None = None
    rewrites: tuple[RewriteReport, ...] = ()
    notes: list[str] = field(default_factory=list)
    seconds: tuple[float | None, float | None] = (None, None)
    bytes: tuple[float | None, float | None] = (None, None)  # of weights and caches


def run(host: Host, request: Request) -> tuple[Host, Report]:
    """The optimised host (the given one where nothing was gained) and the report. Never changes the given host."""
    clock = Clock()
    with clock.step("recognise"):
        found = recognise(host.graph)
    said = ""
    with clock.step("shape"):
        request = with_shapes(host, found.sites, request)
        if request.inputs is not None and request.workload is None:
            inputs, said = within_memory(host, request.inputs, left())
            request = replace(request, inputs=inputs)
    with clock.step("fold"):
        folded = fold(host, found.sites, request)
    if folded.host is not host:
        found = recognise(folded.host.graph)
    given, host = host, folded.host
    with clock.step("choose"):
        chosen = select_kernels(host, found.sites, request)
    with clock.step("apply"):
        state = State(given, apply_choices(host, chosen), chosen, folded, notes=[said] if said else [])
        if request.plan is not None and request.plan.steps:
            replay(host, request, state)
    if request.inputs is not None:
        verify(host, request, state, clock)
    return state.result, reported(host, request, state, found, clock)


def fold(host: Host, sites: Sequence[Site], request: Request) -> Folded:
    """The exact rewrites of weights that save time, or those of the plan that was given."""
    if request.plan is not None:
        return again(host, fold_steps(request.plan.steps)[0])
    passes = [p for p in request.passes if is_fold(p)]
    if not passes or request.inputs is None:
        return Folded(host)
    known = host.graph.sizes(request.inputs)
    asked = () if request.workload is None else request.workload.bind(sites)
    sizes = [(b.weight, {**known, **b.sizes}) for b in asked] or [(1.0, known)]
    loads = ((1.0, request.inputs),) if request.workload is None else request.shaped.loads
    target = load_target(request.target)[0]
    return Folding(request.select, target, request.runtime, loads, sizes, named=request.named).of(host, passes)


def replay(host: Host, request: Request, state: State) -> None:
    """Make the moves of the plan that was given. What does not stand in it, weights in codes, is computed from the data again."""
    assert request.plan is not None
    shop = workshop(host, request, state.chosen)
    shop.arrays, said = arrays_for(request.plan, setting_for(host, request, state, ()))
    state.notes += said
    try:
        state.moves = shop.arrays.ready(moves_from(fold_steps(request.plan.steps)[1], host))
    except RuntimeError as failure:
        raise PlanError(str(failure), next_move="Give the calibration data that the plan was found with.") from None
    state.result = shop.built(state.moves) if state.moves else state.result


def workshop(host: Host, request: Request, chosen: Sequence[Chosen]) -> Workshop:
    kernels = {c.site.name: c.lowering for c in chosen if c.lowering is not None}
    sizes = host.graph.sizes(request.inputs or {})
    return Workshop(host, kernels, load_target(request.target)[0], request.runtime, request.opset, sizes)


def verify(host: Host, request: Request, state: State, clock: Clock) -> None:
    """Run the result beside the original, search under the budget, time both, and roll back what is slower."""
    assert request.inputs is not None
    inputs = request.inputs
    with clock.step("verify"):
        original = seeded(state.original.runner(), inputs)
        if request.own is not None:
            require_same_model(seeded(request.own.outputs, inputs), original)
        if state.result is state.original:
            state.exact = difference(original, original)
        elif state.moves:
            state.exact = approximate_difference(state.original, state.result, original, inputs)
        else:
            state.exact = require_equal(original, seeded(state.result.runner(), inputs))
    approximate = tuple(p for p in request.passes if not p.exact)
    if not request.budget.exact and request.plan is None and approximate:
        if not any(t.is_floating_point() for t in original) and request.budget.metric != QUALITY:
            why = "the model returns no real numbers, on which a loss is measured"
            state.rewrites = tuple(RewriteReport(p.name, "not tried", False, why) for p in approximate)
        else:
            with clock.step("search"):
                search(host, request, state, approximate)
            if state.moves:
                state.exact = approximate_difference(state.original, state.result, original, inputs)
    elif request.named and request.budget.exact and request.plan is None:
        why = "it is approximate, and no budget says what may be lost: budget=0.01, for example"
        state.rewrites = tuple(RewriteReport(p.name, "not tried", False, why) for p in approximate)
    loads = ((1.0, inputs),) if request.workload is None else request.shaped.loads
    if request.select == "measure" and not loads and (said := UNTIMED + request.shaped.why) not in state.notes:
        state.notes.append(said)
    if request.select == "measure" and loads and state.result is not state.original:
        with clock.step("time"):
            runners = {"before": request.own or state.original.runner(), "after": state.result.runner()}
            times = summed([(w, in_turn({n: partial(r, x) for n, r in runners.items()}, clock=counted())) for w, x in loads])
        state.seconds = (times["before"].median, times["after"].median)
        slower = times["after"].ratio(times["before"]) > SLOWER and request.plan is None
        if slower and request.minimise == "memory" and state.moves:
            state.notes.append(
                f"slower, and kept: memory was to be least, {megabytes(state.bytes[0])} -> {megabytes(state.bytes[1])}"
            )
        elif slower:
            roll_back(state)
            state.exact = difference(original, original)


def approximate_difference(host: Host, result: Host, original: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> Difference:
    names = (host.output_names, result.output_names)
    return difference(original, seeded(result.runner(), inputs), exact=False, names=names)


def search(host: Host, request: Request, state: State, passes: tuple[Pass, ...]) -> None:
    assert request.inputs is not None
    outcome = under_budget(setting_for(host, request, state, passes))
    state.result, state.moves, state.outcome, state.rewrites = outcome.host, outcome.moves, outcome, outcome.rewrites
    state.notes += outcome.notes
    state.bytes = (outcome.memory[0].total, outcome.memory[1].total)


def setting_for(host: Host, request: Request, state: State, passes: tuple[Pass, ...]) -> Setting:
    assert request.inputs is not None
    return Setting(
        host=host,
        current=state.result,
        sites=[c.site for c in state.chosen],
        chosen=state.chosen,
        passes=passes,
        inputs=request.inputs,
        data=request.calibration,
        budget=request.budget,
        target=load_target(request.target)[0],
        runtime=request.runtime,
        opset=request.opset,
        select=request.select,
        effort=request.effort,
        seed=request.seed,
        names=request.names,
        quality=request.quality,
        workload=request.workload,
        shaped=request.shaped,
        store=request.store,
        minimise=request.minimise,
        own=request.own,
        takes=request.takes,
    )


def exact_setting(host: Host, request: Request) -> Setting:
    """What a search starts from: the model with its exact plan, folds and kernels, as `run` chooses them."""
    sites = recognise(host.graph).sites
    request = with_shapes(host, sites, request)
    folded = fold(host, sites, request)
    given, host = host, folded.host
    sites = sites if host is given else recognise(host.graph).sites
    chosen = select_kernels(host, sites, request)
    state = State(given, apply_choices(host, chosen), chosen, folded)
    made = setting_for(host, request, state, tuple(p for p in request.passes if not p.exact))
    return replace(made, given=given, folds=folded.moves) if folded.moves else made


def with_shapes(host: Host, sites: Sequence[Site], request: Request) -> Request:
    """The request with inputs of the shapes that it is for, where models are timed and it names any."""
    if request.workload is None or request.inputs is None or request.select != "measure":
        return request
    machine = load_target(request.target)[0]
    made = shaped(host, sites, request.inputs, request.workload, machine, request.runtime, request.effort)
    return replace(request, shaped=made)


def roll_back(state: State) -> None:
    """The original again, because the whole model measured slower."""
    before, after = state.seconds
    assert before is not None and after is not None
    state.notes.append(f"rolled back: the whole model measured {after * 1e3:.3g} ms against {before * 1e3:.3g} ms before")
    undone = "rolled back with the whole model"
    state.result, state.moves, state.seconds, state.bytes = state.original, (), (before, before), (state.bytes[0],) * 2
    state.chosen = [replace(c, lowering=None, why=undone) for c in state.chosen]
    folds = tuple(replace(r, kept=False, why=f"{r.why}; {undone}") if r.kept else r for r in state.folded.reports)
    state.folded = Folded(state.original, (), folds)
    state.rewrites = tuple(replace(r, kept=False, why=f"{r.why}; {undone}") if r.kept else r for r in state.rewrites)


def reported(host: Host, request: Request, state: State, found: Recognition, clock: Clock) -> Report:
    held = None if state.outcome is None else state.outcome.search
    shop = workshop(host, request, state.chosen)
    plan = Plan(
        host=state.result.kind,
        target=request.target,
        runtime=request.runtime,
        kernels={c.site.name: c.lowering.name for c in state.chosen if c.lowering is not None},
        steps=(*state.folded.steps, *(step_of(m) for m in state.moves)),
        budget=request.budget.allowed,
        metric=held.metric if held and state.moves else "",
        loss=held.loss if held and state.moves else None,
        bound=held.bound if held and state.moves else None,
        seed=request.seed,
        data=state.outcome.data if state.outcome is not None and state.moves else "",
    )
    return Report(
        target=request.target,
        runtime=request.runtime,
        select=request.select,
        budget=request.budget.allowed,
        sites=site_reports(state.chosen, state.moves, shop),
        refusals=found.refusals,
        rewrites=(*state.folded.reports, *state.rewrites),
        difference=state.exact,
        seconds_before=state.seconds[0],
        seconds_after=state.seconds[1],
        bytes_before=state.bytes[0],
        bytes_after=state.bytes[1],
        notes=tuple(state.notes),
        seconds_spent=clock.spent,
        search=held,
        plan=plan if request.plan is None else replace(request.plan, steps=plan.steps),
        fuses=any(p.exact and not is_fold(p) for p in request.passes) if request.plan is None else bool(request.plan.kernels),
    )


def select_kernels(host: Host, sites: Sequence[Site], request: Request) -> list[Chosen]:
    """Let each exact pass propose for each site; choose among the kernels for what was proposed. A given plan names them."""
    if request.plan is not None:
        return kernels_from(request.plan.kernels, sites, host, request.runtime)
    ready: list[Site] = []
    refused: dict[str, str] = {}
    for site in sites:
        group = Group(host, (site,))
        for rewrite in (p for p in request.passes if p.exact and not is_fold(p)):
            proposed = rewrite.propose(group, None)
            if isinstance(proposed, Refusal):
                refused[site.name] = str(proposed)
            else:
                group = rewrite.apply(proposed[0], group)
        if group.sites[0].steps:
            ready.append(group.sites[0])
        else:
            refused.setdefault(site.name, "no exact pass was asked for")
    machine, _ = load_target(request.target)
    inputs = request.shaped.loads[0][1] if request.shaped.loads else request.inputs  # where most of the time goes
    sizes = host.graph.sizes(request.inputs or {})
    asked = () if request.workload is None else request.workload.bind(sites)
    loads = [(bound.weight, {**sizes, **bound.sizes}) for bound in asked]
    decided = choose(
        host, ready, inputs, runtime=request.runtime, opset=request.opset, select=request.select, target=machine, loads=loads
    )
    by_name = {c.site.name: c for c in decided}
    return [by_name.get(s.name) or Chosen(s, None, refused.get(s.name, "")) for s in sites]
