"""Give a linear layer another matrix or another bias, whatever form it has in its model.

    linear(x, W, b), matmul(x, W) + b     ->     the same nodes with W', b'; without a bias, an addition less
    linear(x, W), matmul(x, W)            ->     the layer anew with a bias that it had not

A constant that other nodes read stays theirs: the layer reads its own from then on.
"""

from __future__ import annotations

from torch import Tensor

from attnopt.ir.graph import Value
from attnopt.ir.site import Host
from attnopt.passes.edits.heads.writer import applied
from attnopt.passes.edits.layers.ends import LayerEnds
from attnopt.passes.edits.layers.linear_layers import matrix


def as_wide(data: Tensor) -> Tensor:
    """In float64, in which products of weights are computed."""
    return data.double()


def set_matrix(host: Host, layer: LayerEnds, data: Tensor) -> None:
    """data [out, in], of the size of the old one."""
    weight = layer.node.inputs[1]
    assert weight is not None and weight.load is not None
    held = data if layer.node.op == "linear" else data.T
    host.set_input(layer.node, weight, held.to(weight.load().dtype).contiguous())


def set_bias(host: Host, layer: LayerEnds, data: Tensor, weight: Tensor | None = None) -> None:
    """data [out]; weight [out, in]: of the layer at the same time, where it changes too."""
    if layer.bias is not None and layer.reader is not None:
        assert layer.bias.load is not None
        held = layer.bias.load()
        host.set_input(layer.reader, layer.bias, data.to(held.dtype).reshape(held.shape))
        if weight is not None:
            set_matrix(host, layer, weight)
        return
    written(host, layer, matrix(layer.node) if weight is None else weight, data)


def drop_bias(host: Host, layer: LayerEnds) -> None:
    """Leave out the addition."""
    if layer.reader is not layer.node and layer.node.output.handle is not None:
        host.replace(layer.end, layer.node.output)
    elif layer.bias is not None:
        written(host, layer, None, None)


def written(host: Host, layer: LayerEnds, weight: Tensor | None, bias: Tensor | None) -> None:
    """The layer anew, with its own weight where none is given."""
    own = layer.node.inputs[1]
    assert own is not None
    builder, linear = host.builder(layer.node), layer.node.op == "linear" and len(layer.input.shape or ()) > 2
    held: list[Value] = []
    if weight is None:
        held.append(
            own if linear == (layer.node.op == "linear") else builder.constant(matrix(layer.node).T.contiguous(), own.dtype)
        )
    else:
        held.append(builder.constant((weight if linear else weight.T).contiguous(), own.dtype))
    if bias is not None:
        held.append(builder.constant(bias, own.dtype))
    made = applied(builder, layer.input, held, linear)
    if made.shape != layer.end.shape:
        made = builder.emit("reshape", made, shape=layer.end.shape or (), dtype=made.dtype)
    host.replace(layer.end, made)
