"""Outputs of attentions that are added or subtracted  ->  one Site.

    softmax(q k') v - l * (softmax(q1 k1') v)       softmax … plus(-load(factor0), softmax …, q=q1, k=k1)
    o = softmax(q k') v;  o[:, :h] - l * o[:, h:]   the same, with the two halves of the heads of q and k

Each side may be an attention, a part of its heads, or several side by side whose values are then one (DiffLlama).
Source: "Differential Transformer".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from attnopt.ir.graph import LAYOUT, Graph, Node, Value
from attnopt.ir.layout import AxisSpace, Layout, LayoutMismatch, Operand
from attnopt.ir.site import Site
from attnopt.patterns.differential import Factor, combined
from attnopt.patterns.operands import broadcast_layout
from attnopt.patterns.parting import part, side_by_side
from attnopt.patterns.picking import parting

CROSSED = ("cast", "mul", "permute", "reshape", "slice", "concat")


@dataclass(frozen=True)
class Side:
    """What one side of a sum holds: an attention with this layout, times factors; `found` are the sites it is made of."""

    site: Site
    layout: Layout
    found: tuple[Site, ...]
    factors: tuple[Factor, ...] = ()
    passed: tuple[Node, ...] = field(default=())


def of_outputs(graph: Graph, sites: Sequence[Site]) -> list[Site]:
    """The sites, where those whose outputs over the same values are added or subtracted are one."""
    known = {site.output.value: site for site in sites}
    walk, reached = Walk(known), descendants(known)
    for node in graph.of("add", "sub"):
        if len(node.inputs) != 2 or not all(i in reached for i in node.inputs):
            continue
        sides = [side for i in node.inputs if i is not None and (side := walk.above(i)) is not None]
        if len(sides) != 2 or sides[0].layout != sides[1].layout or sides[0].site.q == sides[1].site.q:
            continue
        first, second = sides
        used = {site.output.value: site for side in sides for site in side.found}
        passed = tuple(dict.fromkeys((*first.passed, *second.passed)))
        if not alone((*used, *(n.output for n in passed)), {*passed, node}, graph):
            continue
        made = combined(first.site, second.site, first.factors, second.factors, node.op == "sub")
        if isinstance(made, Site):
            for value in used:
                del known[value]
            nodes = tuple(dict.fromkeys((*made.nodes, *passed, node)))
            known[node.output] = replace(made, output=Operand(node.output, first.layout), nodes=nodes)
    return list(known.values())


def descendants(known: Mapping[Value, Site]) -> set[Value]:
    """Every value that the outputs reach through what a side may cross."""
    found, stack = set(known), list(known)
    while stack:
        for node in stack.pop().users:
            if node.op in CROSSED and node.output not in found:
                found.add(node.output)
                stack.append(node.output)
    return found


def alone(values: Sequence[Value], readers: set[Node], graph: Graph) -> bool:
    """Whether nothing but these nodes reads the values."""
    return all(value not in graph.outputs and readers.issuperset(value.users) for value in values)


@dataclass
class Walk:
    """Upward from the sides of sums. What two sides have in common is made once, so that both hold the same values."""

    known: Mapping[Value, Site]
    met: dict[Value, Side | None] = field(default_factory=dict)

    def above(self, value: Value) -> Side | None:
        """The attention that a value holds, scaled, arranged, cut and joined."""
        if value in self.known:
            site = self.known[value]
            return Side(site, site.output.layout, (site,))
        if value.producer is None or value.producer.op not in CROSSED:
            return None
        if value not in self.met:
            self.met[value] = self.joined(value.producer) if value.producer.op == "concat" else self.crossed(value.producer)
        return self.met[value]

    def crossed(self, node: Node) -> Side | None:
        """One step: a node that scales, arranges or cuts what one of its inputs holds."""
        sides = {
            i: side for i in node.inputs[: 2 if node.op == "mul" else 1] if i is not None and (side := self.above(i)) is not None
        }
        if len(sides) != 1:
            return None
        ((read, side),) = sides.items()
        side = replace(side, passed=(*side.passed, node))
        try:
            if node.op == "mul":
                if node.output.shape != read.shape:
                    return None
                (other,) = (i for i in node.inputs if i is not read and i is not None)
                return replace(side, factors=(*side.factors, (other, broadcast_layout(other, side.layout))))
            if node.op in LAYOUT:
                space = AxisSpace()
                layout = space.after(node, side.layout)
                return None if space.splits else replace(side, layout=layout)
        except LayoutMismatch:
            return None
        if node.op == "slice":
            parts = parting(node)
            made = None if parts is None or side.factors else part(side.site, side.layout, node.attrs["axis"], parts)
            return None if made is None else replace(side, site=made[0], layout=made[1])
        return side

    def joined(self, node: Node) -> Side | None:
        """Attentions of one q and k side by side along the channels of their values."""
        sides = [side for i in node.inputs if i is not None and (side := self.above(i)) is not None]
        if len(sides) != len(node.inputs) or any(s.factors or s.layout != sides[0].layout for s in sides):
            return None
        layout = sides[0].layout
        made = side_by_side([side.site for side in sides], layout, node.attrs["axis"] % len(layout))
        if made is None:
            return None
        passed = tuple(dict.fromkeys(n for side in sides for n in side.passed))
        return Side(made[0], made[1], tuple(site for side in sides for site in side.found), (), (*passed, node))


__all__ = ["of_outputs"]
