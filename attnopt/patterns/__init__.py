"""Recognition: every attention of a canonical graph as a Site, every near miss as a Refusal with reason and node.

Families are a tuple to read and extend: each takes the graph and yields sites and refusals. One file, one line, one test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from attnopt.ir.collection import paused_collection
from attnopt.ir.graph import Graph, Node
from attnopt.ir.site import Refusal, Site
from attnopt.patterns.activations import Activations
from attnopt.patterns.banded import BandedAttention
from attnopt.patterns.cut_attention import CutAttention, cuts
from attnopt.patterns.differential import DifferentialAttention, combination
from attnopt.patterns.fused_attention import FusedAttention
from attnopt.patterns.lifting import Lifters
from attnopt.patterns.linear_attention import linear_attention
from attnopt.patterns.normalizer import Anchor, anchors
from attnopt.patterns.score import NotAttention
from attnopt.patterns.shared_weights import SharedWeights, products_of
from attnopt.patterns.softmax_attention import SoftmaxAttention
from attnopt.patterns.summed_outputs import of_outputs


@dataclass(frozen=True)
class Recognition:
    """What was found, in graph order."""

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]


def spelled_out(graph: Graph) -> Iterator[Site | Refusal]:
    """Attention written as products around a softmax."""
    activations, lifters = Activations(graph), Lifters(graph)
    weights = {anchor.weights: anchor for anchor in anchors(graph)}
    for anchor in weights.values():
        attempt = SoftmaxAttention(graph=graph, lifters=lifters, activations=activations)
        if cuts(anchor):
            attempt = CutAttention(graph=graph, lifters=lifters, activations=activations)
        elif (met := combination(anchor, weights)) is not None:
            attempt = DifferentialAttention(graph=graph, lifters=lifters, activations=activations, met=met, anchors=weights)
        elif products_of(anchor):
            attempt = SharedWeights(graph=graph, lifters=lifters, activations=activations)
        try:
            yield attempt.from_anchor(anchor)
        except NotAttention as failure:
            refusal = replace(failure.refusal, reached=attempt.reached)
            band = as_band(anchor, graph, lifters, activations)
            # Of two reasons the one that came further is told: a band is one where the plain grammar meets no product at all.
            further = type(attempt) in (SoftmaxAttention, SharedWeights) and attempt.reached == "softmax"
            yield band if isinstance(band, Site) or (band is not None and further) else refusal


def as_band(anchor: Anchor, graph: Graph, lifters: Lifters, activations: Activations) -> Site | Refusal | None:
    """Attention whose softmax runs over the diagonals of chunks; None where the weights do not go through diagonals."""
    attempt = BandedAttention(graph=graph, lifters=lifters, activations=activations)
    try:
        return attempt.from_anchor(anchor)
    except NotAttention as failure:
        return replace(failure.refusal, reached=attempt.reached)


def fused(graph: Graph) -> Iterator[Site | Refusal]:
    """Attention that is one node already."""
    lifters = Lifters(graph)
    for node in graph.of("attention"):
        try:
            yield FusedAttention(graph=graph, lifters=lifters).from_node(node)
        except NotAttention as failure:
            yield failure.refusal


def unread(graph: Graph) -> Iterator[Site | Refusal]:
    """Attention that is one node of the host, which could not be read: the host says why."""
    for node in graph.of("opaque"):
        if node.attrs.get("reason"):
            yield Refusal(f"{node.attrs['operator']}: {node.attrs['reason']}", node)


def inside(graph: Graph) -> Iterator[Site | Refusal]:
    """Attention in what an If, Loop or Scan runs: a graph of its own, whose inputs are also the values around it that it reads."""
    for node, name, body in graph.bodies():
        where = f"inside the {name.replace('_', ' ')} of {node.attrs['operator']} '{node.name}'"
        found = recognise(body)
        yield from found.sites
        for refusal in found.refusals:
            yield replace(refusal, reason=f"{where}: {refusal.reason}")


FAMILIES: tuple[Callable[[Graph], Iterator[Site | Refusal]], ...] = (spelled_out, fused, linear_attention, unread, inside)


def in_order(graph: Graph) -> Iterator[Node]:
    """Every node, those of bodies behind the node that runs them."""
    for node in graph.nodes:
        yield node
        for body in node.attrs.get("bodies", {}).values():
            yield from in_order(body)


@paused_collection()
def recognise(graph: Graph) -> Recognition:
    """All sites and refusals of a graph; site names are unique and stable for equal graphs."""
    found = [item for family in FAMILIES for item in family(graph)]
    order = {node: i for i, node in enumerate(in_order(graph))}
    once = {s.output.value: s for s in found if isinstance(s, Site)}  # either softmax of a difference gives the whole
    sites = sorted(of_outputs(graph, list(once.values())), key=lambda s: order[s.nodes[-1]] if s.nodes else -1)
    counts: dict[str, int] = {}
    named = []
    for site in sites:
        counts[site.name] = counts.get(site.name, 0) + 1
        named.append(site if counts[site.name] == 1 else replace(site, name=f"{site.name}:{counts[site.name]}"))
    return Recognition(tuple(named), tuple(r for r in found if isinstance(r, Refusal)))
