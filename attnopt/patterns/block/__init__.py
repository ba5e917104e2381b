"""The whole block around a site: projections, norms, rotation, cache, residual.

    graph, site   ->   Block("rms_norm -> q 32x32, k 32x16, v 32x16; rotary 8 half base 10000; o 32x32; residual")

Upward from q, k and v (`stream`), downward from the output (`residual`). Nothing is guessed: a part that does not fit is a refusal
in `missing`, and the others stand.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnopt.ir.block import Block, Norm, Projection, Rotary, Step
from attnopt.ir.graph import Graph, Value
from attnopt.ir.site import Refusal, Site
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
    reached = projected(graph)
    return [read(graph, site, reached) for site in sites]


def read(graph: Graph, site: Site, reached: set[Value]) -> Block:
    streams: dict[str, tuple[Step, ...]] = {}
    missing: list[Refusal] = []
    for name in "qkv":
        streams[name], refusal = Stream(graph, Walk(reached)).read(site, name)
        missing += [refusal] if refusal is not None else []
    turns = {name: next((s for s in streams[name] if isinstance(s, Rotary)), None) for name in "qk"}
    q_turn, k_turn = turns["q"], turns["k"]
    if q_turn is not None and k_turn is not None and not q_turn.same(k_turn):
        missing.append(Refusal("queries and keys turn differently", site.name))
    inputs = {name: root(p.input) for name in "qkv" if (p := layer(streams[name])) is not None}
    hidden = inputs.get("q")
    norm = norm_at(hidden) if hidden is not None else None
    found = OutputWalk(Walk(reached)).projection(site)
    output, ending = None, None
    if isinstance(found, Refusal):
        missing.append(found)
    elif hidden is not None:
        output, made = found
        end = residual(made, norm, hidden)
        if isinstance(end, Refusal):
            missing.append(end)
        else:
            ending = end
            norm = before(norm, root(end.value), hidden)
    else:
        output = found[0]
    return Block(streams, output, norm, hidden, inputs.get("k"), ending, tuple(missing))


def layer(steps: Sequence[Step]) -> Projection | None:
    return next((step for step in steps if isinstance(step, Projection)), None)


def before(norm: Norm | None, stream: Value, hidden: Value) -> Norm | None:
    """The norm that belongs to this block: where the residual is taken after a norm, that norm ends the block before."""
    return norm if norm is not None and stream is not hidden else None


__all__ = ["find_block", "find_blocks"]
