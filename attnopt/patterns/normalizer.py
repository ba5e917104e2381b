"""Find every place where a row of numbers becomes a distribution: the anchors of recognition.

    softmax(x)                                   one node
    e / sum(e),  e = exp(x) or exp(x - max(x))   written out by hand, in any of its spellings
    exp(x - log(sum(exp(x))))                    the same by logarithms

An anchor says where the scores go in and where the weights come out; whether it is attention is for the grammar to find.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnopt.ir.graph import LAYOUT, Graph, Node, Value


@dataclass(frozen=True)
class Anchor:
    """A softmax over one axis (counted from the front) of `scores`, giving `weights`; `node` is named in refusals."""

    scores: Value
    weights: Value
    axis: int
    node: Node


def anchors(graph: Graph) -> Iterator[Anchor]:
    for node in graph.nodes:
        anchor = _softmax(node) if node.op == "softmax" else _by_logarithms(node) if node.op == "exp" else _by_hand(node)
        if anchor is not None:
            yield anchor


def _softmax(node: Node) -> Anchor | None:
    scores = node.inputs[0]
    if scores is None or scores.shape is None:
        return None
    scores = _without_maximum(scores)
    if scores.shape is None:
        return None
    return Anchor(scores, node.output, node.attrs["axis"] % len(scores.shape), node)


def _by_hand(node: Node) -> Anchor | None:
    """`div(e, sum(e))` or `mul(e, reciprocal(sum(e)))`."""
    if node.op not in ("div", "mul") or len(node.inputs) != 2:
        return None
    for exponential, total in (node.inputs, node.inputs[::-1]) if node.op == "mul" else (node.inputs,):
        if exponential is None or total is None or exponential.producer is None or exponential.producer.op != "exp":
            continue
        divisor = through_layout(total)
        if node.op == "mul":
            if divisor.producer is None or divisor.producer.op != "reciprocal":
                continue
            divisor = through_layout(_input(divisor))
        summed = divisor.producer
        if summed is None or summed.op != "reduce_sum" or not same_exponential(_input(summed.output), exponential):
            continue
        scores = _without_maximum(_input(exponential))
        if len(summed.attrs["axes"]) != 1 or scores.shape is None:
            continue
        return Anchor(scores, node.output, summed.attrs["axes"][0] % len(scores.shape), node)
    return None


def same_exponential(a: Value, b: Value) -> bool:
    """Whether both are one exp(x), made once or twice."""
    nodes = [a.producer, b.producer]
    return a is b or all(n is not None and n.op == "exp" and n.inputs[0] is _input(b) for n in nodes)


def _by_logarithms(node: Node) -> Anchor | None:
    """`exp(x - logsumexp(x))`."""
    apart = node.inputs[0].producer if node.inputs[0] is not None else None
    if apart is None or apart.op != "sub" or apart.inputs[0] is None or apart.inputs[1] is None:
        return None
    scores, logarithm = apart.inputs[0], through_layout(apart.inputs[1]).producer
    summed = through_layout(_input(logarithm.output)).producer if logarithm is not None and logarithm.op == "log" else None
    if summed is None or summed.op != "reduce_sum" or len(summed.attrs["axes"]) != 1 or scores.shape is None:
        return None
    exponential = _input(summed.output).producer
    if exponential is None or exponential.op != "exp" or exponential.inputs[0] is not scores:
        return None
    return Anchor(scores, node.output, summed.attrs["axes"][0] % len(scores.shape), node)


def _without_maximum(value: Value) -> Value:
    """x, from `x - max(x)`: shifting a row changes no softmax."""
    node = value.producer
    if node is None or node.op != "sub":
        return value
    whole, shift = node.inputs
    if whole is None or shift is None:
        return value
    maximum = through_layout(shift).producer
    return whole if maximum is not None and maximum.op == "reduce_max" and maximum.inputs[0] is whole else value


def through_layout(value: Value) -> Value:
    """The value before any layout operations and casts."""
    while value.producer is not None and (value.producer.op in LAYOUT or value.producer.op == "cast"):
        value = _input(value)
    return value


def _input(value: Value) -> Value:
    assert value.producer is not None and value.producer.inputs[0] is not None
    return value.producer.inputs[0]
