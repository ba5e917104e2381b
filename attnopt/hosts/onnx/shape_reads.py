"""Shapes that are asked of values which nothing else needs any more.

    Shape(context) -> Gather(0) -> …     ->     Shape(input_ids) -> Gather(0) -> …

TorchScript exports ask the result of an attention for its batch size. Left alone, that question would keep the whole replaced
attention alive, and it would be computed twice.
"""

from __future__ import annotations

import onnx_ir as ir

from attnopt.hosts.onnx.builder import OnnxBuilder
from attnopt.hosts.onnx.places import Names, Places
from attnopt.ir.dims import Shape
from attnopt.ir.graph import Graph


def reroute(model: ir.Model, graph: Graph, names: Names) -> None:
    """Answer every Shape of a value that is otherwise dead from the model's inputs, where the canonical graph knows how."""
    shapes = {v.handle: v.shape for v in (*graph.inputs, *(o for n in graph.nodes for o in n.outputs)) if v.handle is not None}
    live = needed_for_data(model)
    inputs = Places.of(Graph(inputs=graph.inputs))
    for node in list(model.graph):
        asked = node.inputs[0] if node.op_type == "Shape" else None
        if asked is None or node not in live or asked.producer() is None or asked.producer() in live:
            continue
        shape: Shape | None = shapes.get(asked)
        if shape is None:
            continue
        part = shape[slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape)))]
        builder = OnnxBuilder(model, inputs, node, names)
        try:
            answer = builder.joined(part)
        except NotImplementedError:  # a size that no input tells: the value stays alive, which is slow but right
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], answer.handle)


def needed_for_data(model: ir.Model) -> set[ir.Node]:
    """Nodes whose data reaches an output; a Shape needs no data of its input."""
    live: set[ir.Node] = set()
    stack = [o.producer() for o in model.graph.outputs]
    while stack:
        node = stack.pop()
        if node is None or node in live:
            continue
        live.add(node)
        if node.op_type not in ("Shape", "Size"):
            stack += [i.producer() for i in node.inputs if i is not None]
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                inner = attribute.as_graph()
                stack += [i.producer() for n in inner.all_nodes() for i in n.inputs if i is not None and i.graph is model.graph]
                stack += [o.producer() for o in inner.outputs if o.graph is model.graph]
    return live
