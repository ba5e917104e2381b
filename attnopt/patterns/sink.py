"""A sink: one more logit in the row of a softmax, whose weight is thrown away afterwards.

softmax(concat([scores, sink]))[..., :-1]     ->     softmax … sink(load(sink0, h))
"""

from __future__ import annotations

from attnopt.ir.graph import Node, Value
from attnopt.patterns.normalizer import Anchor, through_layout
from attnopt.patterns.score import NotAttention


def drops_sink(node: Node, axis: int) -> bool:
    """Whether a slice leaves out one column at an end of the softmax's axis."""
    x = node.inputs[0]
    if node.op != "slice" or node.attrs["axis"] != axis or node.attrs["step"] != 1 or x is None or x.shape is None:
        return False
    start, stop, size = node.attrs["start"], node.attrs["stop"], x.shape[axis]
    whole = stop is None or stop == size or (isinstance(stop, int) and stop > 1 << 30)
    return (start == 0 and (stop == -1 or stop == (node.output.shape or ())[axis] != size)) or (start == 1 and whole)


def split_sink(anchor: Anchor, dropped: Node) -> tuple[Value, Value]:
    """(scores, sink): what the softmax reads, taken apart. Raises NotAttention where a column is dropped that is no sink."""
    value = anchor.scores
    while value.producer is not None and (shifts_by_maximum(value.producer) or value.producer.op == "cast"):
        value = value.producer.inputs[0]  # type: ignore[assignment]
    joined = value.producer
    if joined is None or joined.op != "concat" or joined.attrs["axis"] % len(value.shape or (1,)) != anchor.axis:
        raise NotAttention("a column of the weights is dropped, and the softmax does not read scores joined with a sink", dropped)
    first, *rest = joined.inputs
    if len(rest) != 1 or first is None or rest[0] is None:
        raise NotAttention("more than one sink is joined to the scores", joined)
    scores, sink = (rest[0], first) if dropped.attrs["start"] == 1 else (first, rest[0])
    if sink.shape is None or sink.shape[anchor.axis] != 1:
        raise NotAttention("what is joined to the scores has more than one column", joined)
    return scores, sink


def shifts_by_maximum(node: Node) -> bool:
    """x - max(x) changes no softmax."""
    if node.op != "sub" or node.inputs[0] is None or node.inputs[1] is None:
        return False
    maximum = through_layout(node.inputs[1]).producer
    return maximum is not None and maximum.op == "reduce_max" and maximum.inputs[0] is node.inputs[0]
