"""Deformable attention: weights over points, times what was sampled at those points. There is no product of queries and keys.

softmax(linear(q)) [.., points]  *  grid_sample(v, places) [.., width, points]   summed over the points
"""

from __future__ import annotations

from attnopt.ir.graph import LAYOUT, Node, Value

REASON = (
    "deformable attention: the weights multiply values that '{operator}' samples at computed places;"
    " no scores of queries and keys are made, so there is nothing here for an attention kernel"
)


def sampler(node: Node, weights: Value) -> Node | None:
    """The node that samples what `node` multiplies the weights by; None where nothing is sampled."""
    if node.op != "mul":
        return None
    waiting = [v for v in node.inputs if v is not None and v is not weights]
    seen: set[Value] = set()
    while waiting:
        value = waiting.pop()
        source = value.producer
        if source is None or value in seen:
            continue
        seen.add(value)
        if source.op == "opaque" and "gridsample" in str(source.attrs.get("operator", "")).lower().replace("_", ""):
            return source
        if source.op in LAYOUT or source.op in ("concat", "cast"):
            waiting += [v for v in source.inputs if v is not None]
    return None
