"""Mix what a linear layer reads by Hadamard blocks while the model runs, so that its weights may stand in the mixed basis.

    y = x W'   ->   y = (x H) (W H)'          H of 16 to 128 channels, along the diagonal; H H' = 1

Where no norm stands before a layer, as before the last one of an MLP, no rotation can be folded into the weights of another.
Sources: "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs"; "QuEST: Stable Training of LLMs with 1-Bit Weights and Activations".
"""

from __future__ import annotations

from collections.abc import Sequence

from attnopt.ir.graph import Node, Value
from attnopt.ir.site import Host
from attnopt.rounding.hadamard import hadamard


def mixed_inputs(host: Host, nodes: Sequence[Node], block: int) -> dict[str, Value]:
    """x H in front of the layers, by name; layers that read the same value share it."""
    mixing = hadamard(block)
    assert mixing is not None
    made: dict[Value, Value] = {}
    for node in nodes:
        x = node.inputs[0]
        assert x is not None and x.shape is not None
        if x not in made:
            builder, lead, width = host.builder(node), x.shape[:-1], x.shape[-1]
            assert isinstance(width, int)
            parts = (*lead, width // block, block)
            apart = builder.emit("reshape", x, shape=parts, dtype=x.dtype)
            turned = builder.emit("matmul", apart, builder.constant(mixing, x.dtype), shape=parts, dtype=x.dtype)
            made[x] = builder.emit("reshape", turned, shape=x.shape, dtype=x.dtype)
    return {n.name: made[n.inputs[0]] for n in nodes if n.inputs[0] is not None}
