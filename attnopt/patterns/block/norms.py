"""LayerNorm, RMSNorm and L2 norm, as one node or spelled out, with casts anywhere.

    weight * (x * rsqrt(mean(x ** 2) + eps))        ->  Norm("rms", x, weight, eps)
    (x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + eps) * weight + bias        ->  Norm("layer", x, weight, bias, eps)
    x / max(sqrt(sum(x * x)), eps)        ->  Norm("l2", x, eps)

Each is over the last axis. A gain that is stored less one (1 + weight) keeps its weight and a shift of 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnopt.ir.block import Norm
from attnopt.ir.graph import Node, Value

PARTS = (
    "cast", "mul", "div", "pow", "add", "sub", "rsqrt", "sqrt", "reciprocal", "maximum", "reduce_mean", "reduce_sum",
    "layer_norm", "rms_norm",
)  # fmt: skip
MOST_PARTS = 24


def norm_at(value: Value) -> Norm | None:
    """The norm that this value is the result of."""
    node = peeled(value).producer
    if node is None:
        return None
    if node.op in ("layer_norm", "rms_norm"):
        x, weight, bias, *_ = (*node.inputs, None, None)
        return None if x is None else Norm(node.op.removesuffix("_norm"), x, value, short(node.attrs["eps"]), weight, bias)
    if (bare := core(node)) is not None:
        return replace(bare, output=value)
    if node.op == "mul":
        return gained(node, value)
    if node.op == "add":
        for main, other in sides(node):
            inner = peeled(main).producer
            if other.is_constant and is_row(other) and inner is not None:
                found = core(inner) or (gained(inner, main) if inner.op == "mul" else None)
                if found is not None and found.kind == "layer":
                    return replace(found, bias=other, output=value)
    return None


def gained(node: Node, value: Value) -> Norm | None:
    """A bare norm times a weight."""
    for main, other in sides(node):
        weight = gain(other)
        inner = peeled(main).producer
        if weight is not None and inner is not None and (bare := core(inner)) is not None:
            return replace(bare, weight=weight[0], shift=weight[1], output=value)
    return None


def gain(value: Value) -> tuple[Value, float] | None:
    """(weight, 0), or (weight, 1) from 1 + weight."""
    value = peeled(value)
    if value.is_constant:
        return (value, 0.0) if is_row(value) else None
    node = value.producer
    if node is not None and node.op == "add":
        for main, other in sides(node):
            number = other.scalar()
            if peeled(main).is_constant and is_row(main) and isinstance(number, (int, float)):
                return peeled(main), float(number)
    return None


def is_row(value: Value) -> bool:
    """A vector along the last axis."""
    return bool(value.shape) and all(size == 1 for size in value.shape[:-1])  # type: ignore[index]


@dataclass(frozen=True)
class Spread:
    """sqrt(mean(x²) + eps) or its reciprocal."""

    of: Value
    eps: float
    reduced: str
    floor: bool = False


def core(node: Node) -> Norm | None:
    """x * 1/spread(x) or x / spread(x), where x is the row or the row less its mean."""
    if node.op not in ("mul", "div"):
        return None
    for main, other in sides(node) if node.op == "mul" else sides(node)[:1]:
        spread = reciprocal_spread(other) if node.op == "mul" else root(other)
        if spread is None or not same(peeled(main), peeled(spread.of)):
            continue
        if spread.reduced == "reduce_sum":
            return Norm("l2", main, node.output, spread.eps, floor=spread.floor)
        row = without_mean(main)
        return Norm("rms", main, node.output, spread.eps) if row is None else Norm("layer", row, node.output, spread.eps)
    return None


def reciprocal_spread(value: Value) -> Spread | None:
    node = peeled(value, "cast", "expand").producer
    if node is None or node.inputs[0] is None:
        return None
    if node.op == "rsqrt":
        return spread_below(node.inputs[0])
    if node.op == "reciprocal":
        return root(node.inputs[0])
    if node.op == "pow" and node.inputs[1] is not None and node.inputs[1].scalar() == -0.5:
        return spread_below(node.inputs[0])
    if node.op == "div" and node.inputs[1] is not None and node.inputs[0].scalar() == 1:
        return root(node.inputs[1])
    return None


def root(value: Value) -> Spread | None:
    """sqrt(mean(x²) + eps), or max(sqrt(sum(x²)), eps)."""
    node = peeled(value, "cast", "expand").producer
    if node is None or node.inputs[0] is None:
        return None
    if node.op == "sqrt" or (node.op == "pow" and node.inputs[1] is not None and node.inputs[1].scalar() == 0.5):
        return spread_below(node.inputs[0])
    if node.op == "maximum":
        for main, other in sides(node):
            eps, inner = other.scalar(), peeled(main).producer
            if eps is not None and inner is not None and inner.op == "sqrt" and inner.inputs[0] is not None:
                found = spread_below(inner.inputs[0])
                return (
                    replace(found, eps=short(float(eps)), floor=True)
                    if found is not None and found.reduced == "reduce_sum"
                    else None
                )
    return None


def spread_below(value: Value) -> Spread | None:
    """The mean of squares under a root, with what is added to it."""
    node = peeled(value).producer
    eps = 0.0
    if node is not None and node.op == "add":
        for main, other in sides(node):
            if (number := other.scalar()) is not None:
                eps, node = short(float(number)), peeled(main).producer
                break
    if node is None or node.op not in ("reduce_mean", "reduce_sum") or not over_last(node) or node.inputs[0] is None:
        return None
    squared = peeled(node.inputs[0]).producer
    if squared is None or squared.op not in ("pow", "mul") or squared.inputs[0] is None or squared.inputs[1] is None:
        return None
    x, by = squared.inputs
    assert x is not None and by is not None
    square = by.scalar() == 2 if squared.op == "pow" else by is x
    return Spread(x, eps, node.op) if square else None


def without_mean(value: Value) -> Value | None:
    """x, from x - mean(x)."""
    node = peeled(value).producer
    if node is None or node.op != "sub" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    mean = peeled(node.inputs[1]).producer
    if mean is None or mean.op != "reduce_mean" or not over_last(mean) or mean.inputs[0] is None:
        return None
    return node.inputs[0] if peeled(mean.inputs[0]) is peeled(node.inputs[0]) else None


def over_last(node: Node) -> bool:
    x = node.inputs[0]
    return x is not None and x.shape is not None and node.attrs["axes"] == (len(x.shape) - 1,) and bool(node.attrs["keepdims"])


def short(number: float) -> float:
    """The number as it was written: float32 holds 7 digits."""
    return float(f"{number:.7g}")


def same(a: Value, b: Value) -> bool:
    """One value, or the same x - mean(x) written twice."""
    one, two = without_mean(a), without_mean(b)
    return a is b or (one is not None and two is not None and peeled(one) is peeled(two))


def sides(node: Node) -> list[tuple[Value, Value]]:
    left, right = node.inputs[:2]
    return [] if left is None or right is None else [(left, right), (right, left)]


def peeled(value: Value, *ops: str) -> Value:
    """The value before its casts, or before these operations."""
    while value.producer is not None and value.producer.op in (ops or ("cast",)) and value.producer.inputs[0] is not None:
        value = value.producer.inputs[0]
    return value


def norm_after(value: Value) -> Norm | None:
    """The norm that reads this value, the outermost node of its spelling."""
    found: Norm | None = None
    seen: set[Value] = {value}
    queue = [value]
    while queue and len(seen) < MOST_PARTS:
        for node in queue.pop(0).users:
            if node.op not in PARTS or node.output in seen:
                continue
            seen.add(node.output)
            queue.append(node.output)
            norm = norm_at(node.output)
            if norm is not None and peeled(norm.input) is peeled(value) and (found is None or not is_inner(norm, found)):
                found = norm
    return found


def is_inner(norm: Norm, other: Norm) -> bool:
    """Whether `other` has at least the parts of `norm`."""
    return (norm.weight is None or other.weight is not None) and (norm.bias is None or other.bias is not None)
