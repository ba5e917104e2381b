"""What happens to the weights between the softmax and the product with the values.

where(isnan(p), 0, p)       rows that saw no key become zero
where(m, p, 0)              the condition of the mask itself: the same; any other: a factor value_scale(where(m, 1.0, 0.0))
p * g                       value_scale(g)
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.graph import Node, Value


@dataclass(frozen=True)
class Reweighing:
    """One factor on the weights: the tensor `by`, or zero where the condition `by` is false (`negated`: is true)."""

    node: Node
    by: Value
    condition: bool
    negated: bool = False


def nan_guard(node: Node, value: Value) -> bool:
    """where(isnan(p), 0, p): rows that saw no key become zero."""
    if node.op != "where" or node.inputs[0] is None or node.inputs[0].producer is None:
        return False
    test = node.inputs[0].producer
    return test.op == "isnan" and test.inputs[0] is value and node.inputs[2] is value and is_zero(node.inputs[1])


def reweighing(node: Node, value: Value) -> Reweighing | None:
    """The factor that a node puts on the weights `value`; None where it does something else."""
    if node.op == "where":
        condition, a, b = node.inputs
        if condition is None:
            return None
        if a is value and is_zero(b):
            return Reweighing(node, condition, True)
        return Reweighing(node, condition, True, negated=True) if b is value and is_zero(a) else None
    if node.op == "mul" and node.output.shape == value.shape:
        others = [i for i in node.inputs if i is not value]
        return Reweighing(node, others[0], False) if len(others) == 1 and others[0] is not None else None
    return None


def weights_of(node: Node, found: Reweighing | None) -> Value | None:
    """The weights that a node between softmax and value product reads."""
    if found is not None:
        return next((i for i in node.inputs if i is not None and i is not found.by and not is_zero(i)), None)
    return node.inputs[2] if node.op == "where" else node.inputs[0]


def is_zero(value: Value | None) -> bool:
    return value is not None and value.scalar() == 0
