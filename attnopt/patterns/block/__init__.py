"""The whole block around a site: projections, norms, rotation, cache, residual.

    graph, site   ->   Block("rms_norm -> q 32x32, k 32x16, v 32x16; rotary 8 half base 10000; o 32x32; residual")

Upward from q, k and v (`stream`), downward from the output (`residual`). Nothing is guessed: a part that does not fit is a refusal
in `missing`, and the others stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from attnopt.ir.block import Block, Norm, Step, projections, turn
from attnopt.ir.graph import Graph, Node, Value
from attnopt.ir.site import Refusal, Site
from attnopt.patterns.block.low_rank import down_to, with_down
from attnopt.patterns.block.norms import norm_at
from attnopt.patterns.block.projection import root
from attnopt.patterns.block.residual import OutputWalk, residual
from attnopt.patterns.block.stream import Stream
from attnopt.patterns.block.terms import Walk, projected


def find_block(graph: Graph, site: Site) -> Block:
    """The block around one site; `find_blocks` reads the graph once for several."""
    return find_blocks(graph, [site])[0]


def find_blocks(graph: Graph, sites: Sequence[Site]) -> list[Block]:
    """The blocks around these sites of the graph, in their order."""
    graphs = list(graph.nested())
    owner = {node: held for held in graphs[1:] for node in held.nodes}
    reached = {id(held): projected(held) for held in graphs}
    own = [owner.get(site.nodes[-1], graph) if site.nodes else graph for site in sites]
    return [read(held, site, reached[id(held)]) for held, site in zip(own, sites, strict=True)]


def read(graph: Graph, site: Site, reached: set[Value]) -> Block:
    streams: dict[str, tuple[Step, ...]] = {}
    missing: list[Refusal] = []
    for name in "qkv":
        streams[name], refusal = Stream(graph, Walk(reached)).read(site, name)
        missing += [refusal] if refusal is not None else []
    missing += different_turns(site, streams)
    found = OutputWalk(Walk(reached)).projection(site)
    hidden, source = (read_by(streams[name]) for name in "qk")
    if isinstance(found, Refusal) or hidden is None:
        missing += [found] if isinstance(found, Refusal) else []
        output = None if isinstance(found, Refusal) else found[0]
        return Block(streams, output, None, hidden, source, None, tuple(missing))
    output, made = found
    norm, ending = norm_at(hidden), residual(made, norm_at(hidden), hidden)
    if isinstance(ending, Refusal):
        paired = {name: with_down(graph, Walk(reached), streams[name]) for name in "qkv"}
        if (below := read_by(paired["q"])) is not None and below is not hidden:
            streams, hidden = paired, below
            norm, ending = norm_at(hidden), residual(made, norm_at(hidden), hidden)
    streams = {name: down_to(graph, Walk(reached), streams[name], hidden) for name in "qkv"}
    source = read_by(streams["k"])
    if isinstance(ending, Refusal):
        return Block(streams, output, norm, hidden, source, None, (*missing, ending))
    norm = before(norm, root(ending.value), hidden)
    own = [p.node for name in "qkv" for up in projections(streams[name]) for p in (up, up.lowest)]
    if norm is not None and all(map(projections, streams.values())) and source is hidden and others_read(hidden, own):
        ending = replace(ending, parallel=True)
    return Block(streams, output, norm, hidden, source, ending, tuple(missing))


def different_turns(site: Site, streams: Mapping[str, tuple[Step, ...]]) -> list[Refusal]:
    """A refusal where queries and keys turn by different angles or in different pairs."""
    q, k = (turn(streams[name]) for name in "qk")
    return [Refusal("queries and keys turn differently", site.name)] if q is not None and k is not None and not q.same(k) else []


def others_read(hidden: Value, own: Sequence[Node]) -> bool:
    """Whether a layer beside the projections reads the same input: that of a parallel branch."""
    for node in hidden.users:
        if node.op in ("linear", "matmul") and node not in own and node.inputs[0] is hidden:
            return True
        if node.op in ("reshape", "cast") and root(node.output) is root(hidden) and others_read(node.output, own):
            return True
    return False


def read_by(steps: Sequence[Step]) -> Value | None:
    """What the lowest layers of these steps read, before layout operations; None where they read different values."""
    found = {root(layer.lowest.input): None for layer in projections(steps)}
    return next(iter(found)) if len(found) == 1 else None


def before(norm: Norm | None, stream: Value, hidden: Value) -> Norm | None:
    """The norm that belongs to this block: where the residual is taken after a norm, that norm ends the block before."""
    return norm if norm is not None and stream is not hidden else None


__all__ = ["find_block", "find_blocks"]
