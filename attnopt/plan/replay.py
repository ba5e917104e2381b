"""Plans and moves: record what was done, and do it again without a search, in the same model or in its export to ONNX.

recorded(host, chosen, moves)  ->  Plan          moves_from(plan, host)  ->  the same moves          transferred(plan, torch, onnx)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from attnopt.analysis.evidence import Evidence
from attnopt.codegen import LOWERINGS
from attnopt.codegen.lowering import Lowering
from attnopt.errors import PlanError, UnknownPass
from attnopt.ir.graph import Node
from attnopt.ir.site import Host, Site
from attnopt.passes import ALL, Candidate, Group
from attnopt.passes.candidate import Computes
from attnopt.plan.arrays import Arrays
from attnopt.plan.budgeted import Setting, halves
from attnopt.plan.choose import Chosen
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import Move
from attnopt.report.plan import Plan, PlanStep

OTHER_DATA = "numbers were computed from other data than those that the plan was found on: its loss is not known to hold"
OTHER = "The plan is of another model, or of another form of this one (torch, ONNX): search again."


def step_of(move: Move) -> PlanStep:
    candidate = move.candidate
    return PlanStep(
        rewrite=candidate.pass_name,
        per=move.rewrite.per,
        group=move.group.name,
        kind=candidate.kind,
        description=candidate.description,
        source=candidate.source,
        nodes=tuple(n.name for n in candidate.nodes),
        removes=tuple(n.name for n in candidate.removes),
        scales=tuple(n.name for n in candidate.scales),
        changes=candidate.changes,
        storage=dict(candidate.storage),
        cached=dict(candidate.cached),
        options=dict(candidate.options),
        layers=dict(candidate.layers),
        shapes=dict(candidate.shapes),
        rows=dict(candidate.rows),
        arrays=dict(candidate.arrays),
    )


def moves_from(steps: Iterable[PlanStep], host: Host) -> tuple[Move, ...]:
    """The moves that steps describe, on a host with the same names. Raises PlanError where it has not, UnknownPass."""
    grouping = Grouping(host)
    passes = {p.name: p for p in ALL}
    made = []
    for step in steps:
        if step.rewrite not in passes:
            raise UnknownPass(step.rewrite, passes)
        rewrite = passes[step.rewrite]
        group = next((g for g in grouping.of(rewrite.per) if g.name == step.group), None)
        if group is None:
            raise PlanError(f"the model has no '{step.group}', which '{step.rewrite}' of the plan changes", next_move=OTHER)
        nodes = {n.name: n for n in reversed(host.graph.nodes)} | {n.name: n for n in group.linears}
        made.append(Move(rewrite, group, candidate_of(step, nodes)))
    return tuple(made)


def candidate_of(step: PlanStep, nodes: Mapping[str, Node]) -> Candidate:
    if missing := [n for n in (*step.nodes, *step.removes, *step.scales) if n not in nodes]:
        raise PlanError(f"the model has no node '{missing[0]}', which '{step.rewrite}' of the plan changes", next_move=OTHER)
    return Candidate(
        step.rewrite,
        False,
        step.description,
        step.source,
        tuple(nodes[n] for n in step.nodes),
        step.options,
        step.kind,
        step.changes,  # type: ignore[arg-type]
        tuple(nodes[n] for n in step.removes),
        step.storage,
        step.cached,
        tuple(nodes[n] for n in step.scales),
        step.layers,
        step.shapes,
        step.rows,
        arrays=step.arrays,
    )


def arrays_for(plan: Plan, setting: Setting) -> tuple[Arrays, list[str]]:
    """What the moves of a plan compute beside what stands in it: from the half of the data that it was chosen by.

    Other calibration data do as well, with a line; example inputs only where the plan was found on them. Else nothing is computed, and
    applying a move says what it lacks.
    """
    passes = {p.name: p for p in ALL}
    if all(step.arrays or not step.nodes or not isinstance(passes.get(step.rewrite), Computes) for step in plan.steps):
        return Arrays(), []
    half, _ = halves(replace(setting, seed=plan.seed))
    same = half.fingerprint == plan.data
    if not same and setting.data is None:
        return Arrays(), []
    evidence = Evidence(setting.host, half, sites=setting.sites, store=setting.store)
    return Arrays(evidence), [] if same else [OTHER_DATA]


def kernels_from(kernels: Mapping[str, str], sites: Sequence[Site], host: Host, runtime: str) -> list[Chosen]:
    """The kernel that a plan names for each site. Raises PlanError for a site or kernel that is not there, or does not fit."""
    known = {x.name: x for x in LOWERINGS if x.host == host.kind}
    names = {s.name for s in sites}
    if missing := [name for name in kernels if name not in names]:
        raise PlanError(f"the model has no attention '{missing[0]}'", next_move=OTHER)
    return [Chosen(s, fitting(kernels[s.name], s, known, runtime), "as the plan says") if s.name in kernels else
            Chosen(s, None, "the plan leaves it as it is") for s in sites]  # fmt: skip


def fitting(name: str, site: Site, known: Mapping[str, Lowering], runtime: str) -> Lowering:
    if name not in known:
        raise PlanError(f"the plan names the kernel '{name}', which is not known here", where=site.name, next_move=OTHER)
    if (refusal := known[name].supports(site, runtime)) is not None:
        raise PlanError(f"the kernel '{name}' of the plan does not fit: {refusal.reason}", where=site.name, next_move=OTHER)
    return known[name]


def transferred(steps: Sequence[PlanStep], before: Host, after: Host) -> list[PlanStep]:
    """The steps in the names of an export: groups and layers are matched in order. Raises PlanError where their numbers differ."""
    old, new = Grouping(before), Grouping(after)
    made = []
    for step in steps:
        groups, others = old.of(step.per), new.of(step.per)  # type: ignore[arg-type]
        at = next(i for i, g in enumerate(groups) if g.name == step.group)
        if len(old.linears) != len(new.linears) or len(groups) != len(others) or not alike(groups[at], others[at]):
            raise PlanError(
                f"the ONNX export has {len(new.linears)} linear layers where the torch model has {len(old.linears)}, so that "
                f"'{step.rewrite}' cannot be carried over",
                next_move="Export as .pt2, or export the original to ONNX and optimise that file with the budget.",
            )
        layers = dict(zip((n.name for n in old.linears), (n.name for n in new.linears), strict=True))
        names = {**layers, **dict(zip((n.name for n in groups[at].linears), (n.name for n in others[at].linears), strict=True))}
        names |= dict(zip(site_nodes(groups[at]), site_nodes(others[at]), strict=False))
        if len(mine := lookups(before)) == len(theirs := lookups(after)):
            names |= dict(zip(mine, theirs, strict=True))
        removes = removed(step.removes, groups[at], others[at], names)
        if any(n not in names for n in step.nodes) or removes is None:
            raise PlanError(f"'{step.rewrite}' changes nodes that the export does not have", next_move="Export as .pt2.")
        sites = {a.name: b.name for a, b in zip(old.sites, new.sites, strict=False)}
        made.append(
            replace(
                step,
                group=others[at].name,
                nodes=tuple(names[n] for n in step.nodes),
                removes=removes,
                scales=tuple(layers[n] for n in step.scales),
                options=in_names(step.options, sites, {**layers, **names}),
                cached=in_names(step.cached, sites),
                storage={names[n]: kept for n, kept in step.storage.items()},
                layers={names[n]: size for n, size in step.layers.items()},
                shapes=in_names(step.shapes, sites),
                rows=in_names(step.rows, sites),
                arrays={names[n]: held for n, held in step.arrays.items()},
            )
        )
    return made


def lookups(host: Host) -> list[str]:
    """The nodes that look rows up in a stored table."""
    tables = ((n, n.inputs[0]) for n in host.graph.of("gather"))
    return [n.name for n, t in tables if t is not None and t.is_constant and len(t.shape or ()) == 2]


def removed(names: Sequence[str], group: Group, other: Group, known: Mapping[str, str]) -> tuple[str, ...] | None:
    """The nodes that go, in the names of the other group: of a site that goes all that it has there. None where one is not known."""
    gone = [(a, b) for a, b in zip(group.sites, other.sites, strict=True) if a.nodes and a.nodes[-1].name in names]
    inside = {n.name for a, _ in gone for n in a.nodes}
    rest = [n for n in names if n not in inside]
    if any(n not in known for n in rest):
        return None
    return tuple(dict.fromkeys([*(known[n] for n in rest), *(n.name for _, b in gone for n in b.nodes)]))


def in_names(options: Any, sites: Mapping[str, str], layers: Mapping[str, str] | None = None) -> Any:
    """Options in which every name of a site is that of its twin, and every layer by whose name something is kept."""
    if isinstance(options, Mapping):
        twins = {**(layers or {}), **sites}
        return {twins.get(key, key): in_names(value, sites, layers) for key, value in options.items()}
    if isinstance(options, (list, tuple)):
        return [in_names(value, sites, layers) for value in options]
    return sites.get(options, options) if isinstance(options, str) else options


def alike(one: Group, other: Group) -> bool:
    return len(one.linears) == len(other.linears) and len(one.sites) == len(other.sites)


def site_nodes(group: Group) -> list[str]:
    """The last node of each site: the only one of which two forms of a model have one each."""
    return [s.nodes[-1].name for s in group.sites if s.nodes]
