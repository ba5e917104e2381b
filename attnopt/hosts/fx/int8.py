"""One linear layer on int8 weights, its input quantised on the fly.

linear(x, W, b)     ->   attnopt.linear_dynamic_int8(x, W_int8, scales, b)
embedding(W, ids)   ->   attnopt.int8_rows(ids, W_int8, scales, factors)       where a table is tied to the layer: the codes stand once
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from attnopt.hosts.fx.builder import FxBuilder
from attnopt.runtime.dynamic_int8 import quantize_weight


def quantize_linear(builder: FxBuilder, node: fx.Node, factors: Tensor | None = None, reads: fx.Node | None = None) -> fx.Node:
    """Write the int8 layer in place of a linear, matmul or addmm node with a constant weight.

    factors [in] multiply the channels of the weight first; reads: what the layer reads instead.
    """
    x, weight, bias = parts_of(builder.module, node)
    x = x if reads is None else reads
    weight = weight if factors is None else weight * factors
    stored, scales = quantize_weight(weight)
    made = builder.call(
        torch.ops.attnopt.linear_dynamic_int8.default,
        *(builder_value(builder, part) for part in (x, stored, scales, bias)),
        shape=(),
    )
    node.replace_all_uses_with(made.handle)
    return made.handle  # type: ignore[no-any-return]


def look_up(builder: FxBuilder, node: fx.Node, ids: fx.Node, layer: fx.Node, factors: Tensor | None) -> fx.Node:
    """Write the look-up of rows in the codes of a layer that `quantize_linear` wrote, in place of a node that takes them of the table.

    factors: those that the weight was multiplied by.
    """
    codes, scales = (again(builder, node, part) for part in layer.args[1:3])
    undone = builder_value(builder, None if factors is None else 1.0 / factors)
    made = builder.call(torch.ops.attnopt.int8_rows.default, ids, codes, scales, undone, shape=())
    node.replace_all_uses_with(made.handle)
    return made.handle  # type: ignore[no-any-return]


def again(builder: FxBuilder, before: fx.Node, constant: fx.Node) -> fx.Node:
    """The same constant, read in front of another node, which may stand earlier."""
    with builder.module.graph.inserting_before(before):
        made = builder.module.graph.get_attr(str(constant.target))
    made.meta["val"] = constant.meta.get("val")
    return made  # type: ignore[no-any-return]


def builder_value(builder: FxBuilder, part: fx.Node | Tensor | None) -> object:
    if isinstance(part, Tensor):
        return builder.constant(part, str(part.dtype).removeprefix("torch."))
    return part


def constant(module: fx.GraphModule, node: object) -> Tensor:
    """What a get_attr node holds."""
    data: object = module
    for part in str(node.target).split("."):  # type: ignore[attr-defined]
        data = getattr(data, part)
    return data.detach()  # type: ignore[attr-defined, no-any-return]


def parts_of(module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, Tensor, fx.Node | None]:
    """(input, weight [out, in], bias) of a linear, matmul, mm or addmm node."""
    if node.target is torch.ops.aten.linear.default:
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        return node.args[0], constant(module, node.args[1]), bias  # type: ignore[return-value]
    if node.target is torch.ops.aten.addmm.default:
        return node.args[1], constant(module, node.args[2]).t().contiguous(), node.args[0]  # type: ignore[return-value]
    return node.args[0], constant(module, node.args[1]).t().contiguous(), None  # type: ignore[return-value]
