"""The story of one optimisation, step by step.

recognise -> propose -> choose kernels -> apply -> verify -> approximate under the budget -> time -> roll back if slower
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor

from attnopt.ir.site import Host, Refusal, Site
from attnopt.passes import ALL, Group, Pass
from attnopt.patterns import recognise
from attnopt.plan.approximate import Evidence, approximate
from attnopt.plan.choose import ORIGINAL, Chosen, apply_choices, choose
from attnopt.plan.quality import natural_metric
from attnopt.plan.timing import in_turn
from attnopt.plan.verify import difference, require_equal, seeded
from attnopt.report.data import Report, RewriteReport, SiteReport

SLOWER = 1.05  # a whole model that measures slower than this share of the original is rolled back


@dataclass(frozen=True)
class Request:
    """What the user asked for. `inputs` are named example tensors; `calibration` what losses are measured on."""

    target: str
    runtime: str
    opset: int
    select: str
    budget: float
    passes: tuple[Pass, ...] = ALL
    inputs: Mapping[str, Tensor] | None = None
    calibration: Sequence[Mapping[str, Tensor]] = ()
    output_name: str = ""


@dataclass
class Clock:
    """Seconds spent per step, for the report."""

    spent: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - started


def run(host: Host, request: Request) -> tuple[Host, Report]:
    """The optimised host (the given one where nothing was gained) and the report. Never changes the given host."""
    clock = Clock()
    with clock.step("recognise"):
        found = recognise(host.graph)
    with clock.step("choose"):
        chosen = select_kernels(host, found.sites, request)
    with clock.step("apply"):
        result = apply_choices(host, chosen)
    exact = None
    rewrites: list[RewriteReport] = []
    notes: list[str] = []
    seconds_before = seconds_after = None
    if request.inputs is not None:
        with clock.step("verify"):
            original = seeded(host.runner(), request.inputs)
            exact = (
                require_equal(original, seeded(result.runner(), request.inputs))
                if result is not host
                else difference(original, original)
            )
        if request.budget > 0:
            with clock.step("approximate"):
                result, rewrites = under_budget(host, result, request)
            if any(r.kept for r in rewrites):
                exact = difference(original, seeded(result.runner(), request.inputs), exact=False)
        if request.select == "measure" and result is not host:
            with clock.step("time"):
                before, after = host.runner(), result.runner()
                times = in_turn({"before": lambda: before(request.inputs), "after": lambda: after(request.inputs)})  # type: ignore[arg-type]
            seconds_before, seconds_after = times["before"].median, times["after"].median
            if times["after"].ratio(times["before"]) > SLOWER:
                notes.append(
                    f"rolled back: the whole model measured {seconds_after * 1e3:.3g} ms against {seconds_before * 1e3:.3g} ms before"
                )
                result, exact, seconds_after = host, difference(original, original), seconds_before
                undone = "rolled back with the whole model"
                chosen = [replace(c, lowering=None, why=undone) for c in chosen]
                rewrites = [replace(r, kept=False, why=f"{r.why}; {undone}") if r.kept else r for r in rewrites]
    report = Report(
        target=request.target,
        runtime=request.runtime,
        select=request.select,
        budget=request.budget,
        sites=tuple(site_report(c) for c in chosen),
        refusals=found.refusals,
        rewrites=tuple(rewrites),
        difference=exact,
        seconds_before=seconds_before,
        seconds_after=seconds_after,
        notes=tuple(notes),
        seconds_spent=clock.spent,
    )
    return result, report


def select_kernels(host: Host, sites: Sequence[Site], request: Request) -> list[Chosen]:
    """Let each exact pass propose for each site; choose among the kernels for what was proposed."""
    ready: list[Site] = []
    refused: dict[str, str] = {}
    for site in sites:
        group = Group(host, (site,))
        for rewrite in (p for p in request.passes if p.exact):
            proposed = rewrite.propose(group, None)
            if isinstance(proposed, Refusal):
                refused[site.name] = str(proposed)
            else:
                group = rewrite.apply(proposed[0], group)
        if group.sites[0].steps:
            ready.append(group.sites[0])
        else:
            refused.setdefault(site.name, "no exact pass was asked for")
    decided = choose(host, ready, request.inputs, runtime=request.runtime, opset=request.opset, select=request.select)
    by_name = {c.site.name: c for c in decided}
    return [by_name.get(s.name) or Chosen(s, None, refused.get(s.name, "")) for s in sites]


def under_budget(host: Host, current: Host, request: Request) -> tuple[Host, list[RewriteReport]]:
    """Each approximate pass in turn, its loss measured against the untouched original."""
    inputs = request.calibration or ([request.inputs] if request.inputs is not None else [])
    run_original = host.runner()
    outputs = [run_original(i) for i in inputs]
    first = next((t for t in outputs[0] if t.is_floating_point()), None)
    if first is None:
        why = "the model returns no real numbers, on which a loss is measured"
        return current, [
            RewriteReport(p.name, "not tried", False, why) for p in request.passes if not p.exact and p.per == "linear"
        ]
    assert request.inputs is not None
    evidence = Evidence(inputs, outputs, request.inputs, natural_metric(request.output_name, first), request.budget)
    tries: list[RewriteReport] = []
    for rewrite in (p for p in request.passes if not p.exact and p.per == "linear"):
        current, more = approximate(current, rewrite, evidence, measure=request.select == "measure")
        tries += more
    return current, tries


def site_report(chosen: Chosen) -> SiteReport:
    site = chosen.site
    return SiteReport(
        name=site.name,
        before=str(site.spec),
        after=str(site.spec),
        shape={axis: str(size) for axis, size in site.shape.items()},
        kernel=chosen.lowering.name if chosen.lowering else ORIGINAL,
        why=chosen.why,
        steps=site.steps if chosen.lowering else (),
        seconds_before=chosen.seconds_before,
        seconds_after=chosen.seconds_after,
        choices=chosen.choices,
    )
