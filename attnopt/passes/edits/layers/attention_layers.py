"""The layers of a model, each an attention with the linear layers around it, and which of those narrow an MLP.

q, k, v, attention, o, gate, up, down | q, k, v, …   ->   (attention 0, (q, k, v, o, gate, up, down)), (attention 1, …)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attnopt.ir.graph import Node
from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Group
from attnopt.passes.edits.layers.linear_layers import matrix

Layer = tuple[Site, Sequence[Node]]


def layers_of(group: Group) -> list[Layer]:
    """Each attention with the linear layers from its first projection up to the next attention's, or to the last writer of the stream."""
    order = {n: i for i, n in enumerate(group.host.graph.nodes)}
    starts = []
    for site, block in zip(group.sites, group.blocks, strict=True):
        first = [order[p.lowest.node] for name in "qkv" for p in block.projections(name) if p.lowest.node in order]
        if first:
            starts.append((min(first), site))
    starts.sort(key=lambda s: s[0])
    ends = [*(at for at, _ in starts[1:]), last_of(group, order)][: len(starts)]
    made: list[Layer] = []
    for (start, site), end in zip(starts, ends, strict=True):
        made.append((site, tuple(n for n in group.linears if n in order and start <= order[n] < end)))
    return made


def last_of(group: Group, order: Mapping[Node, int]) -> int:
    """One past the last linear layer of the last block: what only a final norm's reader is, the head, comes after it."""
    stream = group.stream
    if stream is None or isinstance(stream, Refusal):
        return len(order)
    return 1 + max(order[w.node] for w in stream.writers if w.node in order)


def narrowing(group: Group) -> list[Node]:
    """The last layers of MLPs: those of a layer that are no projection of its attention, and write fewer channels than they read."""
    projections = {p.node for b in group.blocks for name in "qkv" for p in b.projections(name)}
    projections |= {b.o.node for b in group.blocks if b.o is not None}
    inside = [n for _, nodes in layers_of(group) for n in nodes if n not in projections]
    return [n for n in inside if matrix(n).shape[0] < matrix(n).shape[1]]
