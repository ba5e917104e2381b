"""One linear layer whose weights stay in few bits.

linear(x, W, b)   ->   attnopt.rounded_linear(x, codes, steps, zeros, b, bits, middle)
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from attnopt.hosts.fx.builder import FxBuilder
from attnopt.hosts.fx.int8 import builder_value, parts_of
from attnopt.rounding.rounded_weight import RoundedWeight


def store_rounded(builder: FxBuilder, node: fx.Node, weight: RoundedWeight, reads: fx.Node | None = None) -> fx.Node:
    """Write the layer in place of a linear, matmul or addmm node; `weight` is what it multiplies by, as [out, in].

    reads: what the layer reads instead.
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
    node.replace_all_uses_with(made.handle)
    return made.handle  # type: ignore[no-any-return]
