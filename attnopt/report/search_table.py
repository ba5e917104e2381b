"""Searches and plans as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from attnopt.report.plan import Plan
from attnopt.report.search import GroupReport, SearchReport, StepReport
from attnopt.report.table import grouped, megabytes, milliseconds, table


def search_table(search: SearchReport | None) -> Any:
    """For each group its options: what they save and lose, and why each was taken or lost. Groups that are alike are one row."""
    if search is None:
        return Text("nothing approximate was asked for: no budget was given")
    body = table("group", "option", "predicted", "measured", "memory", f"loss ({search.metric})", "why")
    rows = [row for group in search.groups for row in group_rows(group)]
    last = ""
    for name, cells in grouped(rows):
        body.add_row(Text(name if name != last else ""), *map(Text, cells))
        last = name
    steps = [Text(step_line(s, search.steps)) for s in search.steps]
    return Group(body, *steps, Text(search_line(search)))


def group_rows(group: GroupReport) -> list[tuple[str, tuple[str, ...]]]:
    made = [
        (
            group.name,
            (
                f"{'*' if o.taken else ' '} {o.kind}",
                milliseconds(o.predicted),
                milliseconds(o.measured),
                megabytes(o.bytes),
                f"{o.loss:.2g}{' ?' * o.estimated}" if o.loss is not None else "",
                o.why,
            ),
        )
        for o in group.options
    ]
    return [*made, *((group.name, ("", "", "", "", "", refusal)) for refusal in group.refusals)]


def step_line(step: StepReport, steps: Sequence[StepReport]) -> str:
    """A step; one of several of its kind with the groups that it is about."""
    alone = sum(s.kind == step.kind for s in steps) == 1
    return f"{step.kind} ({step.groups if alone else ', '.join(step.names)}): {step.why}"


def search_line(search: SearchReport) -> str:
    """What the search used, in one line."""
    choose, validate = search.samples
    data = f"chosen by {choose} samples" + (f", validated by {validate} others" if validate else ", which judged it too")
    again = f" ({search.remembered} read back)" if search.remembered else ""
    memory = f", at most {search.peak_memory / 2**30:.2g} GiB" if search.peak_memory else ""
    memory += f" of {search.memory_limit / 2**30:.2g} allowed" if memory and search.memory_limit else ""
    return (
        f"search: effort {search.effort}, seed {search.seed}, {search.seconds:.1f} s, {search.measurements} measurements{again}{memory}; "
        f"{data}; solver within {search.gap:.2%} of the best"
    )


def plan_table(plan: Plan) -> Any:
    head = Text(f"a plan for {plan.target}, {plan.runtime}: {len(plan.kernels)} kernels, {len(plan.steps)} rewrites")
    body = table("place", "what", "source")
    rows: list[tuple[str, tuple[str, ...]]] = [(site, (f"kernel {kernel}", "")) for site, kernel in plan.kernels.items()]
    rows += [(s.group, (f"{s.rewrite}: {s.description}", s.source)) for s in plan.steps]
    for name, cells in grouped(rows):
        body.add_row(Text(name), *map(Text, cells))
    parts: list[Any] = [head, body]
    if plan.loss is not None:
        bound = "" if plan.bound is None else f" (at most {plan.bound:.3g} with 95 % confidence)"
        parts.append(Text(f"{plan.metric} {plan.loss:.3g}{bound}, budget {plan.budget:g}"))
    return Group(*parts)
