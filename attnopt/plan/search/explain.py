"""Why each option was taken or lost, in words, from what the search knows.

int8            taken: saves 0.12 ms, alone loses mean KL 3.1e-05
int8 smoothed   beaten by 'int8', which saves more and loses less
window 16       alone loses mean KL 0.24, over the budget 0.01
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from attnopt.ir.site import Refusal
from attnopt.plan.options.proposals import Class, Move, Proposal, described
from attnopt.plan.search.search import Search
from attnopt.report.search import GroupReport, OptionReport, StepReport


def explained(
    search: Search, picks: Sequence[int] | None, kept: Collection[Move], steps: Sequence[StepReport]
) -> tuple[GroupReport, ...]:
    """The report of every group.

    picks: of the plan that was chosen, None where none held; kept: its moves that were not undone; steps: as they were checked.
    """
    checked = {(step.kind, name): step for step in steps for name in step.names}
    return tuple(group_report(search, g, each, picks, list(kept), checked) for g, each in enumerate(search.classes))


def group_report(
    search: Search,
    g: int,
    each: Class,
    picks: Sequence[int] | None,
    kept: Sequence[Move],
    checked: Mapping[tuple[str, str], StepReport],
) -> GroupReport:
    made = []
    for i, option in enumerate(each.options):
        if not option.moves:
            continue
        taken = all(m in kept for m in option.moves) and picks is not None and picks[g] == i
        step = checked.get((option.kind, option.moves[0].group.name))
        if taken:
            why = taken_for(search, (g, i), option) if known(search, (g, i)) or step is None else f"taken: {step.why}"
        elif step is not None and not step.kept:
            why = step.why
        elif picks is not None and picks[g] == i:
            why = "undone: what the checked steps left lost too much on the data held back"
        else:
            why = lost(search, g, i, picks, kept)
        made.append(option_report(search, (g, i), option, taken, why))
    refusals = tuple(f"{name}: {refusal}" for name, refusal in each.refusals)
    return GroupReport(each.name, tuple(made), refusals)


def option_report(search: Search, place: tuple[int, int], option: Proposal, taken: bool, why: str) -> OptionReport:
    before, after = search.prices.predicted(option)
    return OptionReport(
        kind=option.kind,
        description=option.description,
        taken=taken,
        why=why,
        source="; ".join(dict.fromkeys(m.candidate.source for m in option.moves if m.candidate.source)),
        predicted=before - after,
        measured=search.prices.measured(option),
        loss=search.losses.total(search.predicted(place)),
        estimated=place not in search.alone,
        bytes=search.memory.saved(option.moves),
    )


def known(search: Search, place: tuple[int, int]) -> bool:
    """Whether anything was measured of what an option loses by itself, or everywhere."""
    return place in search.alone or search.everywhere[search.classes[place[0]].options[place[1]].kind].samples > 0


def loss_of(search: Search, place: tuple[int, int]) -> str:
    loss, name = search.losses.total(search.predicted(place)), search.losses.judge.metric.name
    return f"alone loses {name} {loss:.2g}" if place in search.alone else f"its share of what the kind loses is {name} {loss:.2g}"


def gain_of(search: Search, option: Proposal) -> str:
    worth = search.worth(option)
    if search.goal == "everything":
        return "holds the budget"
    if search.goal == "time" and all(m.narrows for m in option.moves):
        return f"makes the model {search.memory.saved(option.moves) / 1e6:.3g} MB smaller"
    return f"saves {worth / 1e6:.3g} MB" if search.goal == "memory" else f"saves {worth * 1e3:.3g} ms"


def taken_for(search: Search, place: tuple[int, int], option: Proposal) -> str:
    return f"taken: {gain_of(search, option)}, {loss_of(search, place)}"


def lost(search: Search, g: int, i: int, picks: Sequence[int] | None, kept: Sequence[Move]) -> str:
    """The first reason that holds, the most certain first."""
    each, option = search.classes[g], search.classes[g].options[i]
    for move in option.moves:
        if (failure := search.losses.failures.get(described(move))) is not None:
            return f"did not run: {failure}"
    for _, changed in option.specs():
        if isinstance(refused := search.losses.workshop.kernel_for(changed), Refusal):
            return f"no kernel computes '{changed.spec}': {refused.reason}"
    worth, loss = search.worth(option), search.losses.total(search.predicted((g, i)))
    if not known(search, (g, i)):
        return "what it loses was not measured: time was up, a higher effort has more"
    if loss > search.allowed:
        return f"{loss_of(search, (g, i))}, over the budget {search.allowed:g}"
    if worth <= 0:
        return f"saves nothing: {gain_of(search, option)}"
    for j, other in enumerate(each.options):
        if j != i and other.moves and search.worth(other) >= worth and search.predicted((g, j)) <= search.predicted((g, i)):
            return f"beaten by '{other.kind}', which saves as much and loses no more"
    own = {id(m) for o in each.options for m in o.moves}
    others = [m for m in kept if id(m) not in own]
    if (excluding := next((m for m in others for mine in option.moves if mine.excludes(m)), None)) is not None:
        return f"excluded by '{excluding.candidate.description}' of {excluding.group.name}"
    if picks is None:
        return f"{gain_of(search, option)}, {loss_of(search, (g, i))}; no plan held the budget on all data"
    said = f"'{each.options[picks[g]].kind}' fits better" if picks[g] else "the budget saves more elsewhere"
    return f"{gain_of(search, option)}, {loss_of(search, (g, i))}: {said}"
