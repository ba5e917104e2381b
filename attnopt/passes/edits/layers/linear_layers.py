"""Linear layers as passes on weights see them: which suit, their matrix as [out, in], and what they read.

linear(x, W [out, in])  or  matmul(x, W [in, out])   ->   suits, matrix [out, in], source
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from attnopt.ir.graph import Graph, Node, Value


def suits(node: Node, smallest: int) -> bool:
    """Whether a layer has a constant float32 matrix of at least `smallest` inputs and outputs."""
    if node.op == "matmul" and len(node.inputs) != 2:
        return False
    data, weight = node.inputs[:2]
    if data is None or weight is None or data.is_constant or not weight.is_constant or weight.shape is None:
        return False
    return (
        len(weight.shape) == 2 and weight.dtype == "float32" and all(isinstance(d, int) and d >= smallest for d in weight.shape)
    )


def matrix(node: Node) -> Tensor:
    """The weight as [out, in]."""
    weight = node.inputs[1]
    assert weight is not None and weight.load is not None
    return weight.load() if node.op == "linear" else weight.load().T


def outputs(node: Node) -> int:
    """How many channels a layer makes."""
    shape = (node.inputs[1].shape or (0, 0)) if node.inputs[1] is not None else (0, 0)
    return int(shape[0 if node.op == "linear" else 1])  # type: ignore[arg-type]


def source(node: Node) -> Value | None:
    """What a layer reads, before operations that keep its channels."""
    value = node.inputs[0]
    while value is not None and value.producer is not None and keeps_channels(value.producer):
        value = value.producer.inputs[0]
    return value


def keeps_channels(node: Node) -> bool:
    """Whether a node only lays rows out anew: each keeps its channels."""
    shapes = [v.shape for v in (*node.inputs[:1], node.output) if v is not None and v.shape]
    return node.op in ("reshape", "cast", "expand") and len(shapes) == 2 and shapes[0][-1] == shapes[1][-1]  # type: ignore[index]


def read_by_all(value: Value, layers: Collection[Node], graph: Graph) -> bool:
    """Whether these layers read a value, or a new layout of its rows, and nothing else does."""
    queue, seen = [value], set[Node]()
    while queue:
        held = queue.pop()
        if held in graph.outputs:
            return False
        for user in held.users:
            if keeps_channels(user) and user.inputs[0] is held:
                queue.append(user.output)
            elif user not in layers or user.inputs[0] is not held:
                return False
            seen.add(user)
    return all(n in seen for n in layers)
