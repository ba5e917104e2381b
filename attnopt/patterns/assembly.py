"""From placed operands to a Site: which axes are batch, heads, repetition; where each operand is best read; the spec.

q [j0 | j1 | q | d], k [j0 | j1.0 | k | d], …   ->   axes b = j0, g = j1.0, r = j1.1 and heads(8, 2)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from attnopt.ir.clause import Clause
from attnopt.ir.expr import Apply, Const, Expr, Index, Load, indices
from attnopt.ir.graph import Graph, Node, Value
from attnopt.ir.layout import Axis, AxisSpace, Group, Layout, LayoutMismatch, Operand
from attnopt.ir.site import Site, TensorForm
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns.conditions import Conditions, Reading
from attnopt.patterns.lifting import Lifters
from attnopt.patterns.operands import Candidate, candidates
from attnopt.patterns.picking import part_of
from attnopt.patterns.score import NotAttention, Score
from attnopt.patterns.talking_heads import REMEDY, Mix, over_heads

Placed = tuple[Value, Layout]
LOADED_INDICES = (Index("b"), Index("h"), Index("row"), Index("k"))


@dataclass(kw_only=True)
class Assembly:
    """The axes and operands gathered so far; `site` puts them together.

    picks: axes of the scores of which the output reads one place only, and which one.
    """

    graph: Graph
    lifters: Lifters
    space: AxisSpace = field(default_factory=AxisSpace)
    lead: tuple[Axis, ...] = ()
    q: Axis = Axis("q", 0)
    k: Axis = Axis("k", 0)
    d: Axis = Axis("d", 0)
    e: Axis = Axis("e", 0)
    loads: dict[str, Placed] = field(default_factory=dict)
    picks: dict[Axis, int] = field(default_factory=dict)
    mixes: dict[str, tuple[Mix, Layout]] = field(default_factory=dict)
    weights_used: Node | None = None

    def load(self, value: Value, layout: Layout, kind: str) -> Expr:
        """Remember a mask, bias or scale tensor under a name; the expression that reads it as [B|1, H|1, Q|1, K|1]."""
        name = next((n for n, known in self.loads.items() if known == (value, layout)), None)
        if name is None:
            name = f"{kind}{sum(n.startswith(kind) for n in self.loads)}"
            self.loads[name] = (value, layout)
        return Load(name, LOADED_INDICES)

    def mixed(self, mix: Mix, layout: Layout, kind: str = "mix") -> str:
        """Remember a mix across heads of what has this layout, under a name."""
        name = f"{kind}{sum(n.startswith(kind) for n in self.mixes)}"
        self.mixes[name] = (mix, layout)
        return name

    def weight_mix(self, mix: Mix, layout: Layout) -> Clause:
        name = self.mixed(mix, layout, "weight_mix")
        return Clause("weight_mix", (name,), () if mix.bias is None else (("bias", f"{name}_bias"),))

    def mixtures(self, axes: Mapping[str, Group]) -> dict[str, Operand]:
        """The matrices of the mixes and what they add. Raises LayoutMismatch where one goes over anything but the heads."""
        heads = (*axes["g"], *axes["r"])
        found: dict[str, Operand] = {}
        for name, (mix, layout) in self.mixes.items():
            if not over_heads(self.space.resolve(layout), mix.axis, heads):
                raise LayoutMismatch(f"'{mix.node.name}' mixes another dimension than the heads")
            found[name] = mix.operand(name, heads)
            if mix.bias is not None:
                found[f"{name}_bias"] = mix.added_vector(f"{name}_bias", heads)
        return found

    def site(self, node: Node, queries: Placed, keys: Placed, values: Placed, output: Placed, score: Score) -> Site:
        """`node` names the site. Raises LayoutMismatch where axes do not fit together."""
        choices = {
            "q": candidates(self.space, *queries, (self.q, self.d), scaling=True),
            "k": candidates(self.space, *keys, (self.k, self.d), scaling=True),
            "v": candidates(self.space, *values, (self.k, self.e)),
        }
        written = self.descend(*output)
        loads = {name: candidates(self.space, *placed, ())[-1].operand for name, placed in self.loads.items()}
        axes, picked = self.roles(choices)
        places = {name: self.picked(candidate.operand) for name, candidate in picked.items()}
        operands = {name: self.picked(operand) for name, operand in loads.items()}
        mixing = self.mixtures(axes)
        read = [operand.value for operand in (*places.values(), *operands.values(), *mixing.values())]
        site = Site(
            name=node.source.module or node.name,
            spec=AttentionSpec(),
            axes=axes,
            q=self.resolved(places["q"]),
            k=self.resolved(places["k"]),
            v=self.resolved(places["v"]),
            output=self.resolved(written),
            nodes=interior(written.value, read),
            source=node.source,
            weights_used=self.weights_used,
        )
        factor = picked["q"].factor * picked["k"].factor
        terms = [Clause("scale", (Const(factor),)), *score.terms] if factor != 1.0 else score.terms
        held = {name: held_indices(operand, axes) for name, operand in operands.items()}
        sizes = {"b": site.size("b"), "h": site.size("h"), "row": site.size("q"), "k": site.size("k")}
        raw = {name: (operand.value, operand.layout) for name, operand in operands.items()}
        reading = Reading(self.lifters.of(sizes), axes, raw, node.output.dtype)
        said = reading.read(terms, score.masks, score.empty_row, score.sink, score.factors)
        if self.mixes and (reason := hidden_by_head(said, score)) is not None:
            raise NotAttention(reason, node, REMEDY)
        spec = AttentionSpec(
            heads=shortest("heads", site.size("h"), site.size("g"), site.size("g")),
            width=shortest("width", site.size("d"), site.size("e")),
            offset=None if said.offset is None else Clause("offset", (said.offset,)),
            score=merge_scales(said.score),
            mask=said.mask,
            sink=said.sink,
            empty_row=said.empty_row,
            value_scale=said.value_scale,
            weighting=tuple(score.weighting),
        )
        form = TensorForm(
            biases=tuple(narrow(t.expr(0), held) for t in score.terms if t.name == "add"),
            mask=score.mask and narrow(score.mask, held),
            empty_row=score.empty_row,
            operands=operands,
            stands_for=(spec.score, spec.mask, spec.empty_row),
        )
        loaded = {name: o for name, o in {**said.operands, **mixing}.items() if name in spec.operands}
        return replace(site, spec=spec, operands=loaded, tensor_form=form if operands and not said.zeroed else None)

    def resolved(self, operand: Operand) -> Operand:
        return Operand(operand.value, self.space.resolve(operand.layout))

    def picked(self, operand: Operand) -> Operand:
        """The operand at the one place of each picked axis."""
        for axis, place in self.picks.items():
            operand = part_of(self.space, operand, axis, place)
        return self.resolved(operand)

    def descend(self, value: Value, layout: Layout) -> Operand:
        """Follow the output down through layout operations that are its only use: the kernel may write their result."""
        while len(value.users) == 1 and value not in self.graph.outputs and value.users[0].op in ("permute", "reshape"):
            try:
                layout = self.space.after(value.users[0], layout)
            except LayoutMismatch:
                break
            value = value.users[0].output
        return Operand(value, layout)

    def roles(self, choices: Mapping[str, Sequence[Candidate]]) -> tuple[dict[str, Group], dict[str, Candidate]]:
        """Which leading axes are batch (b), key heads (g) and query heads per key head (r); and the operands to read."""
        leads = [self.space.resolve_group((axis,)) for axis in self.lead]
        held = {name: [self.axes_of(c) for c in options] for name, options in choices.items()}
        deepest = {name: axes[-1] for name, axes in held.items()}
        repeated = {a for g in leads for a in g if a in deepest["q"] and a not in deepest["k"] and a not in deepest["v"]}
        batch, heads = split_heads(leads, repeated, self.beside_channels(choices["q"][-1]))
        tail = tuple(a for a in heads if a in repeated and a.size != 1)
        rows = {name: self.space.resolve_group((getattr(self, name),)) for name in "qkde"}
        # Query heads that share a key head must be neighbours; where they are not, keys are read after their repetition.
        if heads[len(heads) - len(tail) :] == tail:
            needed = {a for a in heads if a not in tail and a.size != 1}
            fits = {
                name: [c for c, axes in zip(choices[name], held[name], strict=True) if needed <= axes and not axes & set(tail)]
                for name in ("k", "v")
            }
            if all(fits.values()):
                picked = {"q": choices["q"][-1], **{name: options[-1] for name, options in fits.items()}}
                return {"b": batch, "g": tuple(a for a in heads if a not in tail), "r": tail, **rows}, picked
        picked = {"q": choices["q"][-1]}
        for name in ("k", "v"):
            full = [c for c, axes in zip(choices[name], held[name], strict=True) if axes.issuperset(heads)]
            picked[name] = full[-1] if full else choices[name][0]
        return {"b": batch, "g": heads, "r": (), **rows}, picked

    def beside_channels(self, query: Candidate) -> set[Axis]:
        """The axes that share a dimension with the channels of the query: a projection writes heads so."""
        channels = self.space.resolve_group((self.d,))
        groups = [g for g in self.space.resolve(query.operand.layout) if set(channels) & set(g)]
        return {axis for group in groups for axis in group if axis not in channels and axis not in self.picks}

    def axes_of(self, candidate: Candidate) -> set[Axis]:
        return {axis for group in self.space.resolve(candidate.operand.layout) for axis in group}


def split_heads(leads: Sequence[Group], repeated: set[Axis], projected: set[Axis]) -> tuple[Group, Group]:
    """Which leading axes are batch and which are heads.

    [b | h] and [b h] split as written; with three or more dimensions the last is the heads, and the last two where the very
    last is the repetition of grouped heads; or another one, where that alone is what a projection wrote beside the channels.
    """
    if not leads:
        return (), ()
    if len(leads) == 1:
        return leads[0][:1], leads[0][1:]
    written = [g for g in leads if g and set(g) == projected]
    if len(leads) >= 3 and written and not projected & repeated:
        return tuple(a for g in leads if g not in written for a in g), written[0]
    count = 2 if len(leads) >= 3 and leads[-1] and set(leads[-1]) <= repeated else 1
    return tuple(a for group in leads[:-count] for a in group), tuple(a for group in leads[-count:] for a in group)


def hidden_by_head(said: Conditions, score: Score) -> str | None:
    """Why a mix across heads would let hidden keys through; None where it does not."""
    names = [term.name for term in score.terms]
    if said.mask is None:
        return None
    if "h" in indices(said.mask):
        return "heads that are mixed hide different keys"
    if any(clause.get("bias") is not None for clause in score.weighting):
        return "what is added to mixed weights reaches hidden keys"
    if "mix" in names and "add" in names[: len(names) - names[::-1].index("mix")]:
        return "a bias that may hide keys is added before the scores are mixed across heads"
    return None


def interior(output: Value, operands: Sequence[Value]) -> tuple[Node, ...]:
    """The nodes between the operands and the output, in graph order."""
    found: dict[Node, None] = {}
    stack, stop = [output], {*operands, *(v for o in operands for v in made_of(o))}
    while stack:
        node = stack.pop().producer
        if node is not None and node not in found:
            found[node] = None
            stack += [i for i in node.inputs if i is not None and i not in stop]
    return tuple(reversed(found))


def made_of(value: Value) -> list[Value]:
    """The values of the host that one which it does not hold is made of."""
    if value.handle is not None or value.producer is None:
        return [value]
    return [v for i in value.producer.inputs if i is not None for v in made_of(i)]


def shortest(name: str, *sizes: object) -> Clause | None:
    """`heads(8, 2, 2)` as heads(8, 2); None where a size is not a number."""
    if not all(isinstance(size, int) for size in sizes):
        return None
    kept = list(sizes)
    while len(kept) > 1 and kept[-1] == kept[-2]:
        kept.pop()
    return Clause(name, tuple(kept))  # type: ignore[arg-type]


def merge_scales(terms: Sequence[Clause]) -> tuple[Clause, ...]:
    """Neighbouring constant scales become one, rounded to the 7 digits that float32 holds; a scale of one disappears."""
    merged: list[Clause] = []
    for term in terms:
        if term.name == "scale" and isinstance(term.args[0], Const):
            value = term.args[0].value
            if merged and merged[-1].name == "scale" and isinstance(merged[-1].args[0], Const):
                value *= merged.pop().args[0].value  # type: ignore[union-attr]
            term = Clause("scale", (Const(float(value)),))
        merged.append(term)
    merged = [Clause("scale", (Const(float(f"{t.args[0].value:.7g}")),)) if is_number(t) else t for t in merged]  # type: ignore[union-attr]
    return tuple(t for t in merged if t != Clause("scale", (Const(1.0),)))


def is_number(term: Clause) -> bool:
    return term.name == "scale" and isinstance(term.args[0], Const)


def narrow(expr: Expr, held: Mapping[str, set[str]]) -> Expr:
    """`load(mask0, b, h, row, k)` with 0 for every index along which the operand does not vary."""
    if isinstance(expr, Apply):
        return Apply(expr.op, tuple(narrow(a, held) for a in expr.args))
    if isinstance(expr, Load) and expr.operand in held and expr.indices == LOADED_INDICES:
        return Load(expr.operand, tuple(i if i.name in held[expr.operand] else Const(0) for i in LOADED_INDICES))
    return expr


def held_indices(operand: Operand, axes: Mapping[str, Group]) -> set[str]:
    groups = {"b": axes["b"], "h": (*axes["g"], *axes["r"]), "row": axes["q"], "k": axes["k"]}
    return {name for name, group in groups.items() if operand.axes & set(group)}
