"""From what an attention reads, upward to the projection that made it: cache, rotation, norms and scales on the way.

concat(past, rotary(rms_norm(linear(x))))   ->   Projection, HeadNorm, Rotary, CacheUpdate (in the order computed)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from attnopt.ir.block import HeadNorm, Joined, Lift, Norm, Part, Scale, Step
from attnopt.ir.graph import Graph
from attnopt.ir.layout import Axis, Operand, size_of
from attnopt.ir.site import Refusal, Site
from attnopt.patterns.block.cache_update import cache_update, meets_cache
from attnopt.patterns.block.norms import norm_at
from attnopt.patterns.block.projection import by_head, layer_at, projection
from attnopt.patterns.block.rotary import rotary
from attnopt.patterns.block.terms import NotRead, Numbers, Term, Walk, whole

MOST_STEPS = 8
NAMES = {"q": "queries", "k": "keys", "v": "values"}


@dataclass
class Stream:
    """One walk; `steps` outermost first. A part that is not found ends it with a refusal."""

    graph: Graph
    walk: Walk
    heads: int = 1
    steps: list[Step] = field(default_factory=list)

    def read(self, site: Site, name: str) -> tuple[tuple[Step, ...], Refusal | None]:
        operand: Operand = getattr(site, name)
        try:
            return self.followed(self.cross(self.start(site, name, operand))), None
        except NotRead as failure:
            return tuple(self.steps[::-1]), Refusal(f"projection of {NAMES[name]} not found: {failure.reason}", failure.at)

    def followed(self, term: Term | None) -> tuple[Step, ...]:
        """The steps in the order computed, once the rest of the way is walked."""
        for _ in range(MOST_STEPS):
            if term is None:
                return tuple(self.steps[::-1])
            term = self.cross(term)
        raise NotRead("too many steps", None if term is None else term.node)

    def start(self, site: Site, name: str, operand: Operand) -> Term:
        width = site.axes["e" if name == "v" else "d"]
        held = operand.axes
        heads = tuple(axis for axis in (*site.axes["g"], *site.axes["r"]) if axis in held)
        channels: tuple[Axis, ...] = (*heads, *width)
        if not all(isinstance(axis.size, int) for axis in channels):
            raise NotRead("the number of heads or their width is not a number", operand.value.producer)
        self.heads = int(size_of(heads))  # type: ignore[arg-type]
        return whole(operand.value, operand.layout, channels, self.heads, int(size_of(width)))  # type: ignore[arg-type]

    def cross(self, start: Term) -> Term | None:
        """One step further up; None at the projection, where the walk ends."""
        return self.step(self.walk.expand(start, stops))

    def step(self, terms: list[Term]) -> Term | None:
        """One step up from what channels are made of."""
        first = terms[0]
        if len(parts := apart(terms, self.heads)) > 1:
            self.steps.append(Joined(tuple(self.part(chosen, group) for chosen, group in parts)))
            return None
        if len(terms) > 1 or first.factors:
            common = abs(first.coefficient)
            if common != 1.0 and all(abs(term.coefficient) == common for term in terms):
                self.steps.append(Scale(common))
                terms = [replace(term, coefficient=term.coefficient / common) for term in terms]
            turn, inner = rotary(self.walk, terms, self.heads)
            self.steps.append(turn)
            return inner
        if first.coefficient != 1.0:
            self.steps.append(Scale(first.coefficient))
        if (layer := layer_at(first.value)) is not None:
            self.steps.append(projection(layer, self.walk, first, self.heads))
            return None
        if (lift := self.lift(first)) is not None:
            return lift
        if (norm := norm_at(first.value)) is not None:
            self.steps.append(self.head_norm(norm, first))
            return Term(norm.input, first.layout, first.index, first.mask)
        if meets_cache(self.walk, first):
            update, inner = cache_update(self.walk, first, self.graph)
            self.steps.append(update)
            return inner
        node = first.node
        if node is None:
            what = "a constant" if first.value.is_constant else "an input of the model"
            raise NotRead(f"they are {what}, '{first.value.name}'")
        raise NotRead(f"'{node.attrs.get('operator', node.op)}' stands between them and a linear layer", node)

    def part(self, chosen: Numbers, terms: list[Term]) -> Part:
        """The channels of each head that come from one value, by a walk of their own."""
        whole = np.flatnonzero(np.tile(chosen, self.heads))
        own = Stream(self.graph, self.walk, self.heads)
        steps = own.followed(own.step([cut(term, whole) for term in terms]))
        return Part(int(np.flatnonzero(chosen)[0]), int(chosen.sum()), steps)

    def lift(self, term: Term) -> Term | None:
        """The rows of each head that a matrix of its own makes these of; None for anything else. The step is noted."""
        node = term.node
        if node is None or node.op != "matmul" or len(node.inputs) != 2:
            return None
        rows, weight = node.inputs
        held, kept = (() if x is None else x.shape or () for x in (weight, rows))
        count = len(term.mask) // self.heads
        if weight is None or rows is None or not weight.is_constant or len(held) != 4 or len(kept) != 4:
            return None
        if (held[0], held[1], held[3]) != (1, self.heads, count) or kept[1] != self.heads:
            return None
        head, channel = (self.walk.coordinate(term, dim) for dim in (1, 3))
        each = np.arange(len(term.mask))
        if not np.array_equal(head, each // count) or not np.array_equal(channel, each % count):  # type: ignore[arg-type]
            return None
        width = int(held[2])  # type: ignore[arg-type]
        self.steps.append(Lift(node, weight))
        self.walk.made += 1
        axes = Axis(f"h{self.walk.made}", self.heads), Axis(f"c{self.walk.made}", width)
        layout = (term.layout[0], (axes[0],), term.layout[2], (axes[1],))
        return whole(rows, layout, axes, self.heads, width)

    def head_norm(self, norm: Norm, term: Term) -> HeadNorm:
        """The channels that are normalised together: those of each head, or all."""
        found = self.walk.coordinate(term, len(term.layout) - 1)
        size = (norm.input.shape or (0,))[-1]
        if found is None or not isinstance(size, int):
            raise NotRead("the norm is not over channels", norm.output.producer)
        numbers = by_head(found, self.heads)
        if all(len(row) == size and np.array_equal(np.sort(row), np.arange(size)) for row in numbers.numpy()):
            return HeadNorm(norm, "head", numbers)
        if np.array_equal(np.unique(found), np.arange(size)) and len(found) % size == 0:
            return HeadNorm(norm, "all", numbers)
        raise NotRead("the norm is over other channels than a head or all heads", norm.output.producer)


def apart(terms: list[Term], heads: int) -> list[tuple[Numbers, list[Term]]]:
    """(which channels of a head, their terms) for each value that makes neighbouring channels alone, the same ones of every head.

    One group where the terms are not so, as in a sum.
    """
    groups: dict[int, list[Term]] = {}
    for term in terms:
        groups.setdefault(id(term.value), []).append(term)
    found = []
    for group in groups.values():
        made = np.logical_or.reduce([term.mask for term in group]).reshape(heads, -1)
        where = np.flatnonzero(made[0])
        if not (made == made[0]).all() or not len(where) or where[-1] - where[0] != len(where) - 1:
            return [(made[0], terms)]
        found.append((made[0], group))
    if len(found) > 1 and (np.sum([chosen for chosen, _ in found], 0) != 1).any():
        return [(found[0][0], terms)]
    return sorted(found, key=lambda part: int(np.flatnonzero(part[0])[0]))


def cut(term: Term, chosen: Numbers) -> Term:
    """The term for these channels only."""
    index = {axis: numbers[chosen] for axis, numbers in term.index.items()}
    return replace(term, index=index, mask=term.mask[chosen], factors=tuple(cut(factor, chosen) for factor in term.factors))


def stops(term: Term) -> bool:
    """Where a part begins that is read as a whole."""
    node = term.node
    if node is None or node.op in ("linear", "matmul", "layer_norm", "rms_norm"):
        return True
    if node.op not in ("add", "mul", "div"):
        return False
    return layer_at(term.value) is not None or norm_at(term.value) is not None
