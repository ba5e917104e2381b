"""One linear layer or table whose weights stay in few bits.

linear(x, W, b)      ->   attnopt.rounded_linear(x, codes, steps, zeros, b, bits, middle)
embedding(T, ids)    ->   attnopt.rounded_rows(ids, codes, steps, zeros, bits, middle, channels)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from attnopt.hosts.fx.builder import FxBuilder
from attnopt.hosts.fx.int8 import again, builder_value, constant, parts_of
from attnopt.rounding.rounded_weight import RoundedWeight
from attnopt.rounding.weight_format import WeightFormat

LAYER = "attnopt.layer"  # in what torch keeps of a node's own metadata, in a file too: the name of the layer that it was


def store_rounded(
    builder: FxBuilder, node: fx.Node, weight: RoundedWeight, reads: fx.Node | None = None, name: str = ""
) -> fx.Node:
    """Write the layer in place of a linear, matmul or addmm node; `weight` is what it multiplies by, as [out, in].

    reads: what the layer reads instead. name: of the layer, by which `stored_codes` finds it.
    """
    x, _, bias = parts_of(builder.module, node)
    x = x if reads is None else reads
    arrays = weight.arrays()
    points = weight.zeros.to(torch.uint8) if isinstance(weight.zeros, Tensor) else None
    middle = 0.0 if isinstance(weight.zeros, Tensor) else weight.zeros
    made = builder.call(
        torch.ops.attnopt.rounded_linear.default,
        *(builder_value(builder, part) for part in (x, arrays["codes"], arrays["steps"], points, bias)),
        weight.format.bits,
        middle,
        shape=(),
    )
    made.handle.meta["custom"] = {**made.handle.meta.get("custom", {}), LAYER: name or node.name}
    node.replace_all_uses_with(made.handle)
    return made.handle  # type: ignore[no-any-return]


def stored_codes(module: fx.GraphModule, formats: Mapping[str, WeightFormat]) -> dict[str, dict[str, Tensor]]:
    """What `store_rounded` wrote for layers of these names, as `RoundedWeight.arrays`; those that are not there are absent."""
    found = {}
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.attnopt.rounded_linear.default):
        name = node.meta.get("custom", {}).get(LAYER, "")
        if name in formats and all(isinstance(part, fx.Node) and part.op == "get_attr" for part in node.args[1:3]):
            codes, steps = (constant(module, part) for part in node.args[1:3])
            points, middle = node.args[3], node.args[6]
            zeros = constant(module, points).float() if isinstance(points, fx.Node) else torch.tensor(float(middle))
            found[name] = {"codes": codes, "steps": steps, "zeros": zeros}
    return found


def store_table(builder: FxBuilder, node: fx.Node, table: RoundedWeight, ids: fx.Node, layer: fx.Node | None = None) -> fx.Node:
    """Write the look-up in place of a node that takes rows of a table [rows, channels].

    layer: what `store_rounded` wrote with the same codes, which are read again.
    """
    middle = 0.0 if isinstance(table.zeros, Tensor) else table.zeros
    if layer is None:
        arrays = table.arrays()
        points = table.zeros.to(torch.uint8) if isinstance(table.zeros, Tensor) else None
        held = [builder_value(builder, part) for part in (arrays["codes"], arrays["steps"], points)]
    else:
        held = [again(builder, node, part) if isinstance(part, fx.Node) else part for part in layer.args[1:4]]
    made = builder.call(
        torch.ops.attnopt.rounded_rows.default,
        ids,
        *held,
        table.format.bits,
        middle,
        table.shape[1],
        shape=(),
    )
    node.replace_all_uses_with(made.handle)
    return made.handle  # type: ignore[no-any-return]
