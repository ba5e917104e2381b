"""Weights that meet several values, whose products stand side by side  ->  one Site with wider values.

    p = softmax(q k');  concat([p v1, p v2])     ->     softmax(q k') v,  v = concat([v1, v2]) along the channels

So are two attentions of the same queries and keys written once their common softmax is computed only once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnopt.ir.graph import Node, Value
from attnopt.ir.layout import Operand
from attnopt.ir.site import Site
from attnopt.patterns.normalizer import Anchor
from attnopt.patterns.score import NotAttention
from attnopt.patterns.softmax_attention import SoftmaxAttention
from attnopt.patterns.summed_outputs import Walk, alone


def products_of(anchor: Anchor) -> tuple[Node, ...]:
    """The products that read the weights, where there are several and nothing else reads them."""
    value = anchor.weights
    while len(value.users) == 1 and value.users[0].op == "cast":
        value = value.users[0].output
    return tuple(value.users) if len(value.users) > 1 and all(n.op == "matmul" for n in value.users) else ()


@dataclass
class SharedWeights(SoftmaxAttention):
    """One attempt to read an anchor whose weights meet several values; as plain attention where these are not joined."""

    def from_anchor(self, anchor: Anchor) -> Site:
        whole = self.joined(anchor)
        return super().from_anchor(anchor) if whole is None else whole

    def joined(self, anchor: Anchor) -> Site | None:
        sites: list[Site] = []
        for product in products_of(anchor):
            attempt = SoftmaxAttention(graph=self.graph, lifters=self.lifters, activations=self.activations, only=product)
            try:
                sites.append(attempt.from_anchor(anchor))
            except NotAttention:
                return None
        node = common_concat([site.output.value for site in sites])
        known = {site.output.value: site for site in sites}
        side = None if node is None else Walk(known).above(node.output)
        if side is None or node is None or len(side.found) != len(sites):
            return None
        if not alone((*known, *(n.output for n in side.passed if n is not node)), set(side.passed), self.graph):
            return None
        nodes = tuple(dict.fromkeys((*side.site.nodes, *side.passed)))
        return replace(side.site, output=Operand(node.output, side.layout), nodes=nodes)


def common_concat(values: list[Value]) -> Node | None:
    """The concat that all of these values enter, each arranged on the way."""
    found: set[Node] = set()
    for value in values:
        while len(value.users) == 1 and value.users[0].op in ("permute", "reshape", "cast"):
            value = value.users[0].output
        found |= {value.users[0]} if len(value.users) == 1 and value.users[0].op == "concat" else set()
    return found.pop() if len(found) == 1 else None
