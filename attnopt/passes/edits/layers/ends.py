"""Where a linear layer begins and ends in its model: what it reads, and the first value that holds all it gives, bias included.

x -> linear(W, b)            ->   (x, that value, b)
x -> matmul(W) -> + b        ->   (x, the sum, b)            matmul(W) that more than an addition reads: (x, the product, None)
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.graph import Node, Value
from attnopt.ir.site import Refusal
from attnopt.passes.edits.layers.linear_layers import keeps_channels, outputs, source
from attnopt.passes.value_scaling import bias_of


@dataclass(frozen=True, eq=False)
class LayerEnds:
    """reader: the node that reads the bias; end: a value of the host, laid out as its shape says."""

    node: Node
    input: Value
    end: Value
    bias: Value | None = None
    reader: Node | None = None

    @property
    def reads(self) -> tuple[Value | None, object]:
        """Equal for layers that read the same rows in the same form."""
        return source(self.node), self.input.shape


def ends_of(node: Node) -> LayerEnds | Refusal:
    """The ends of a linear layer with a constant weight; a refusal where its host has no value that holds what it gives."""
    found = bias_of(node)
    reader, bias = (None, None) if found is None or not is_row(found[1], outputs(node)) else found
    end = node.output if reader is None or reader is node else reader.output
    while end.handle is None:
        user = end.users[0] if len(end.users) == 1 else None
        if user is None or not keeps_channels(user):
            return Refusal("what the layer gives is no value of the model", node)
        end = user.output
    x = node.inputs[0]
    return Refusal("the layer reads nothing", node) if x is None else LayerEnds(node, x, end, bias, reader)


def is_row(value: Value, width: int) -> bool:
    """Whether a value is one number for each of so many channels."""
    shape = value.shape or ()
    return bool(shape) and shape[-1] == width and all(d == 1 for d in shape[:-1])
