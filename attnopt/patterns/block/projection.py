"""Linear layers with constant weights: linear, matmul, Conv1D, MatMul and Add, Gemm.

add(matmul(x, weight [in, out]), bias)   ->   weight, bias, transposed, x          linear(x, weight [out, in], bias)   ->   …
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from attnopt.ir.block import Projection
from attnopt.ir.graph import Node, Value
from attnopt.patterns.block.norms import sides
from attnopt.patterns.block.terms import NotRead, Term, Walk


@dataclass(frozen=True)
class Layer:
    """A linear layer: what it reads, its weight as stored, and the node that reads the weight."""

    node: Node
    input: Value
    weight: Value
    bias: Value | None
    transposed: bool


def layer_at(value: Value) -> Layer | None:
    """The linear layer that makes this value; None where it is something else. Raises NotRead for a weight that is computed."""
    node = value.producer
    if node is None:
        return None
    if node.op == "add":
        for main, other in sides(node):
            if other.is_constant and is_bias(other, value) and (layer := product_below(main)) is not None:
                return replace(layer, bias=other)
        return None
    return product(node)


def product_below(value: Value) -> Layer | None:
    """The product under a bias; a reshape between them keeps the channels."""
    node = value.producer
    while node is not None and node.op == "reshape" and keeps_channels(node):
        assert node.inputs[0] is not None
        node = node.inputs[0].producer
    layer = None if node is None else product(node)
    return layer if layer is not None and layer.bias is None else None


def product(node: Node) -> Layer | None:
    if node.op not in ("linear", "matmul") or node.inputs[0] is None or node.inputs[1] is None:
        return None
    x, weight = node.inputs[:2]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    assert x is not None and weight is not None
    held, turned = stored(weight)
    if held is None:
        if node.op == "linear":
            raise NotRead(made_by(weight), weight.producer or node)
        return None
    if bias is not None and not bias.is_constant:
        raise NotRead("its bias is computed, not constant", bias.producer or node)
    return Layer(node, x, held, bias, turned != (node.op == "matmul"))


def made_by(weight: Value) -> str:
    made = weight.producer
    if made is None:
        return "its weight is an input of the model, not constant"
    return f"its weight is made by '{made.attrs.get('operator', made.op)}', not constant"


def stored(weight: Value) -> tuple[Value | None, bool]:
    """(constant, transposed) from a constant of rank 2 or its transpose."""
    turned = False
    while not weight.is_constant and weight.producer is not None and weight.producer.op == "permute":
        (source,) = weight.producer.inputs
        if source is None or tuple(weight.producer.attrs["perm"]) != (1, 0):
            break
        weight, turned = source, not turned
    constant = weight.is_constant and weight.shape is not None and len(weight.shape) == 2
    return (weight if constant else None), turned


def is_bias(bias: Value, result: Value) -> bool:
    shape, made = bias.shape or (), result.shape or ()
    return bool(shape) and bool(made) and shape[-1] == made[-1] and all(size == 1 for size in shape[:-1])


def keeps_channels(node: Node) -> bool:
    source, result = (node.inputs[0].shape if node.inputs[0] is not None else None), node.output.shape
    return bool(source) and bool(result) and source[-1] == result[-1]  # type: ignore[index]


def root(value: Value) -> Value:
    """The value before layout operations that keep its rows whole, and casts."""
    while (node := value.producer) is not None and node.inputs and node.inputs[0] is not None:
        if node.op == "cast" or (node.op in ("reshape", "expand") and keeps_channels(node)):
            value = node.inputs[0]
        else:
            break
    return value


def projection(layer: Layer, walk: Walk, term: Term, heads: int) -> Projection:
    """The layer at a term's value as the projection of an operand: its channels are what the term reads along the last dimension."""
    found = walk.coordinate(term, len(term.layout) - 1)
    _, dims = walk.channel(term)
    if found is None or dims[-1:] != (len(term.layout) - 1,) or any(term.value.shape[d] != 1 for d in dims[:-1]):  # type: ignore[index]
        raise NotRead("heads are not channels of this layer", layer.node)
    return Projection(layer.weight, layer.bias, layer.transposed, layer.node, layer.input, by_head(found, heads))


def by_head(numbers: np.ndarray, heads: int) -> torch.Tensor:
    return torch.from_numpy(numbers.reshape(heads, -1).copy())
