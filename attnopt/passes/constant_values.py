"""What a value holds that is made of constants alone: computed once, instead of at each call.

permute(reshape(gather(table [169, H], index [2401])))   ->   Tensor [H, 49, 49]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.graph import Node, Value
from attnopt.ir.site import Refusal

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    name: getattr(torch, name)
    for name in ("neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid", "relu", "floor", "round")
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in ("add", "sub", "mul", "div", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge")
    },
    "matmul": torch.matmul,
}


def fixed(value: Value) -> bool:
    """Whether a value is a constant, or made of constants alone: 1 + weight."""
    node = value.producer
    if value.is_constant or node is None:
        return value.is_constant
    return bool(node.inputs) and all(v is None or fixed(v) for v in node.inputs)


def held(value: Value) -> Tensor | Refusal:
    """The data of a fixed value, in its shape and type; a refusal names the operation that is not computed here."""
    if value.load is not None:
        return value.load()
    node = value.producer
    if node is None or len(node.outputs) != 1 or not all(isinstance(d, int) for d in value.shape or (None,)):
        return Refusal(f"'{value.name}' is not made of constants alone, or its size is not known")
    inputs = []
    for given in node.inputs:
        found = None if given is None else held(given)
        if isinstance(found, Refusal):
            return found
        inputs.append(found)
    made = computed(node, inputs, tuple(int(d) for d in value.shape or ()))  # type: ignore[arg-type]
    if made is None:
        return Refusal(f"'{node.attrs.get('operator', node.op)}' of constants is not computed here", node)
    wanted = getattr(torch, value.dtype) if value.dtype else made.dtype
    if tuple(made.shape) != value.shape:
        return Refusal("the size of what constants make is not the one that the graph says", node)
    return made.to(wanted)


def computed(node: Node, x: list[Any], shape: tuple[int, ...]) -> Tensor | None:
    a = node.attrs
    if node.op in UNARY:
        return UNARY[node.op](x[0])
    if node.op in BINARY:
        return BINARY[node.op](x[0], x[1])
    if node.op in ("reshape", "expand"):
        return x[0].reshape(shape) if node.op == "reshape" else x[0].expand(shape)  # type: ignore[no-any-return]
    if node.op == "permute":
        return x[0].permute(tuple(a["perm"]))  # type: ignore[no-any-return]
    if node.op == "cast":
        return x[0]  # type: ignore[no-any-return]
    if node.op == "where":
        return torch.where(x[0], x[1], x[2])
    if node.op == "concat":
        return torch.cat(x, a["axis"])
    if node.op == "gather":
        return rows(x[0], x[1], a["axis"])
    if node.op == "index" and len(x) == 2:
        return rows(x[0], x[1], a["axes"][0])
    return None


def rows(data: Tensor, index: Tensor, axis: int) -> Tensor:
    """The entries of one axis at these places, of which negative ones count from the end."""
    places = torch.where(index < 0, index + data.shape[axis], index).long()
    made = data.index_select(axis, places.reshape(-1))
    return made.reshape(*data.shape[:axis], *places.shape, *data.shape[axis + 1 :])
