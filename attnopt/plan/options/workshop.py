"""Build what moves describe: a copy of the original with weights edited, sites rewritten, and a kernel for each attention.

    scaled weights -> finish -> edits of the host -> finish -> new specs of sites -> kernels -> finish

Each result is made from the original, so no move sees what another trial left. Sites that no move touches keep the kernel that was
chosen for the exact plan; where moves touch none at all, only weights of layers, the copy is of the original with its kernels, which are
written once. What is only run a few times, to see what it loses, is given kernels that need no compiler (`brief`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from attnopt.codegen import AS_STORED, ON_CPU, ON_GPU
from attnopt.codegen.lowering import Lowering
from attnopt.cost.estimate import estimate
from attnopt.cost.target import Target
from attnopt.ir.dims import evaluate
from attnopt.ir.graph import Graph, Value
from attnopt.ir.layout import Operand
from attnopt.ir.site import Host, Refusal, Site
from attnopt.passes import Group
from attnopt.plan.arrays import Arrays
from attnopt.plan.choose import applicable, emit
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.one_look import on_one_look
from attnopt.plan.options.proposals import Move

COMPILED = (
    "tvm",
    "triton",
    "flex",
    "summed-tvm",
    "summed-triton",
    "summed-flex",
)  # prefixes of kernels that are compiled for a spec
COMPILING = 2.0  # seconds that it takes
BRIEF = 500  # calls of one attention for which a plan is built that is only measured for what it loses
WIDEST = "triton-prefill"  # the family that computes most: where it refuses too, its reason is the one to tell


@dataclass
class Workshop:
    """The original, the kernel of each of its sites (by name; absent where its own nodes stay), and what kernels run on.

    arrays: what moves need beside what was proposed.
    """

    host: Host
    kernels: Mapping[str, Lowering]
    target: Target
    runtime: str
    opset: int
    sizes: Mapping[str, int]
    arrays: Arrays = field(default_factory=Arrays)
    known: dict[tuple[str, str, bool], Lowering | Refusal] = field(default_factory=dict)

    def built(self, moves: Sequence[Move], *, brief: bool = False) -> Host:
        """A copy of the original after these moves, with kernels. Raises RuntimeError where a move has no kernel, or no arrays.

        brief: it is run a few times: a kernel that would have to be compiled for it is not worth that.
        """
        moves = self.arrays.ready(moves)
        if moves and self.kernels and all(leaves_sites(m) and self.layers.get(m.group.name) == names(m.group) for m in moves):
            return self.edited(self.fused.copy(), moves, {})
        return self.rewritten(moves, brief)

    @cached_property
    def fused(self) -> Host:
        """The original with its kernels."""
        return self.rewritten(())

    @cached_property
    def layers(self) -> Mapping[str, tuple[str, ...]]:
        """The linear layers of each group, where the kernels are in."""
        return {g.name: names(g) for g in Grouping(self.fused).of("linear")}

    def edited(self, result: Host, edits: Sequence[Move], stored: dict[str, Site]) -> Host:
        """The host itself after moves that edit it. stored: filled with sites on their caches as these come and go from now on."""
        there, first = Grouping(result), [m for m in edits if m.candidate.scales]
        for move in first:
            move.rewrite.apply(move.candidate, twin(there, move))
        anew = bool(first)  # others read the weights that these scaled
        for run in on_one_look(m for m in edits if not m.candidate.scales):
            if anew:
                result.finish()
                there = Grouping(result)
            for move in run:
                group = twin(there, move)
                made = [s for s in move.rewrite.apply(move.candidate, group).sites if all(s is not old for old in group.sites)]
                stored.update({s.name: s for s in made if s.codes or s.spec.selection is not None})
            anew = any("structure" in m.candidate.changes for m in run)  # what the next move reads is not there any more
        if edits:
            result.finish()
        return result

    def rewritten(self, moves: Sequence[Move], brief: bool = False) -> Host:
        """A copy of the original after any moves, with kernels."""
        stored: dict[str, Site] = {}
        result = self.edited(self.host.copy(), [m for m in moves if m.edits], stored)
        others = [m for m in moves if not m.edits]
        reshaped = {name for m in moves if m.edits for name in m.candidate.shapes}
        if not others and not self.kernels and not stored and not reshaped:
            return result
        there = Grouping(result)
        changed = respecified(there, others)
        replaced: dict[Value, Value] = {}
        for made in (s for s in stored.values() if not s.codes):
            if (read := self.as_stored(made, made, result.graph)) is not None:
                paged, reader = read
                replaced[paged.output.value] = emit(result, paged, reader)
        for site in there.sites:
            lowering: Lowering | Refusal | None = self.kernels.get(site.name)
            if site.name in changed:
                lowering = self.kernel_for(changed[site.name], brief)
            elif site.name in reshaped:  # written as plain nodes; what suited the old heads may not suit the new ones
                lowering = self.faster(site, brief)
            coded = stored.get(site.name)
            if coded is not None and coded.codes:
                read = self.as_stored(changed.get(site.name, site), coded, result.graph)
                if read is not None:
                    changed[site.name], lowering = read
            if isinstance(lowering, Refusal) and site.name in changed:
                raise RuntimeError(f"no kernel computes '{changed[site.name].spec}': {lowering.reason}")
            if lowering is not None and not isinstance(lowering, Refusal):
                reading = changed.get(site.name, site).reading(replaced)
                replaced[site.output.value] = emit(result, reading, lowering)
        result.finish()
        return result

    def kernel_for(self, site: Site, brief: bool = False) -> Lowering | Refusal:
        """The kernel that is predicted to compute a rewritten site fastest, or why there is none. brief: compiling it counts too."""
        key = (str(site.spec), str(site.shape), brief)

        def spent(lowering: Lowering) -> float:
            seconds = self.seconds(site, lowering.name)
            return BRIEF * seconds + COMPILING * lowering.name.startswith(COMPILED) if brief else seconds

        if key not in self.known:
            fits, refused = applicable(site, self.host, self.runtime, self.opset, self.target.kind, self.target.arch)
            told = {choice.kernel: choice.why for choice in refused}
            reason = told.get(WIDEST) or next(iter(told.values()), f"no kernel for host {self.host.kind}")
            why = Refusal(reason, site.name)
            self.known[key] = min(fits, key=spent, default=None) or why
        return self.known[key]

    def as_stored(self, site: Site, stored: Site, graph: Graph) -> tuple[Site, Lowering] | None:
        """A site of the graph on its cache as a pass let it come and go, with the kernel that reads it so; None where there is none."""
        held = on_codes(site, stored, graph) if stored.codes else on_pages(stored, graph)
        reader = None if held is None else self.reads_stored(held)
        return None if held is None or reader is None else (held, reader)

    def readers(self, moves: Sequence[Move]) -> dict[str, Lowering]:
        """By site, the kernel that reads its cache as these moves let it come and go, where there is one."""
        edits, stored = [m for m in moves if m.edits and "cache" in m.candidate.changes], dict[str, Site]()
        if not edits:
            return {}
        host = self.edited(self.host.copy(), edits, stored)
        sites = {site.name: site for site in Grouping(host).sites}
        pairs = ((name, self.as_stored(sites.get(name, made), made, host.graph)) for name, made in stored.items())
        return {name: read[1] for name, read in pairs if read is not None}

    def reads_stored(self, site: Site) -> Lowering | None:
        """The kernel that computes a spec on a cache as it is stored; None where nodes have to decode or gather it before."""
        here = ON_CPU if self.target.kind == "cpu" else ON_GPU
        fits = (x for x in AS_STORED if x in here and x.host == self.host.kind)
        return next((x for x in fits if x.supports(site, self.runtime) is None), None)

    def faster(self, site: Site, brief: bool = False) -> Lowering | None:
        """The kernel for a site whose nodes were written anew; None where its nodes are predicted to be as fast."""
        found = self.kernel_for(site, brief)
        if isinstance(found, Refusal):
            return None
        fused = any(node.op == "attention" for node in site.nodes)
        plain = {
            ("torch", True): "sdpa",
            ("torch", False): "eager",
            ("onnx", True): "onnx-attention",
            ("onnx", False): "ort-eager",
        }
        return found if self.seconds(site, found.name) < self.seconds(site, plain[self.host.kind, fused]) else None

    def seconds(
        self, site: Site, kernel: str, sizes: Mapping[str, int] | None = None, shape_after: Mapping[str, int] | None = None
    ) -> float:
        """Predicted seconds of one call, on the example's sizes where no others are given. shape_after: axes of other sizes."""
        try:
            shape = {axis: evaluate(dim, self.sizes if sizes is None else sizes) for axis, dim in site.shape.items()}
            shape |= shape_after or {}
        except KeyError:  # a length that only running the model would tell: the first kernel that fits
            return 0.0
        return estimate(site.spec, shape, site.q.value.dtype or "float32", kernel, target=self.target).seconds


def respecified(there: Grouping, moves: Sequence[Move]) -> dict[str, Site]:
    """The sites, by name, whose specs are others after moves that edit no host."""
    changed: dict[str, Site] = {}
    for move in moves:
        group = twin(there, move)
        group = replace(group, sites=tuple(changed.get(s.name, s) for s in group.sites))
        changed |= {s.name: s for s in move.rewrite.apply(move.candidate, group).sites}
    return changed


def on_codes(site: Site, coded: Site, graph: Graph) -> Site | None:
    """A site on the cache in codes that a pass made of it, in the graph as it is now; None where that has lost something of it."""
    sides = {side: getattr(coded, side).value for side in "kv" if any(name.startswith(f"{side}_") for name in coded.codes)}
    now = current(graph, (*sides.values(), *coded.codes.values()))
    if coded.spec.cache is None or now is None:
        return None
    codes = {name: now[value] for name, value in coded.codes.items()}
    return site.on_codes(coded.spec.cache, {side: now[value] for side, value in sides.items()}, codes)


def on_pages(made: Site, graph: Graph) -> Site | None:
    """A site that chooses pages of its cache, in the graph as it is now, whose nodes choose, gather and attend; None as above."""
    now = current(graph, [made.output.value, *(operand.value for operand in made.reads)])
    return None if now is None else replace(made.reading(now), output=Operand(now[made.output.value], made.output.layout))


def current(graph: Graph, values: Iterable[Value]) -> dict[Value, Value] | None:
    """Values of a graph before it was read anew as those that it has now; None where one is gone."""
    there = {id(v.handle): v for v in (*graph.inputs, *(v for n in graph.nodes for v in n.outputs)) if v.handle is not None}
    found = {value: there.get(id(value.handle)) for value in values}
    return None if None in found.values() else {value: now for value, now in found.items() if now is not None}


def names(group: Group) -> tuple[str, ...]:
    return tuple(n.name for n in group.linears)


def leaves_sites(move: Move) -> bool:
    """Whether a move changes weights of the layers of its own group only, which are the same with and without kernels."""
    return move.rewrite.per == "linear" and set(move.candidate.changes) == {"weights"}


def twin(there: Grouping, move: Move) -> Group:
    """The group of a move in an equal host. Raises RuntimeError where an earlier move left none of that name."""
    found = next((g for g in there.of(move.rewrite.per) if g.name == move.group.name), None)
    if found is None:
        raise RuntimeError(f"'{move.group.name}' is not there any more")
    return found
