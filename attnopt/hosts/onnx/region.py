"""A part of an ONNX graph as a model of its own: what lies between some values and others.

    region(q, k, v -> output)   ->   model(q, k, v) -> output

Where the part only asks for the shape of something outside, a tensor of zeros of that shape stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from attnopt.hosts.onnx.checking import is_given
from attnopt.hosts.onnx.execution import runner
from attnopt.ir.dims import Shape, evaluate
from attnopt.ir.graph import Graph, Value
from attnopt.ir.site import NotIsolated


def isolate(
    model: ir.Model, graph: Graph, inputs: Sequence[Value], outputs: Sequence[Value]
) -> Callable[[Sequence[Any]], list[Any]]:
    """The part between these values. Raises NotIsolated where it needs the data of anything but `inputs`."""
    canonical = {v.handle: v for v in (*graph.inputs, *(o for n in graph.nodes for o in n.outputs)) if v.handle is not None}
    stop = {v.handle for v in inputs}
    nodes, shaped = closure([v.handle for v in outputs], stop)
    asked = [canonical.get(held) for held in shaped]
    known = {
        d.names[0] for v in inputs for d in v.shape or () if not isinstance(d, int) and d.coefficient == 1 and len(d.names) == 1
    }
    stands: list[Shape] = []
    for value, (held, axes) in zip(asked, shaped.items(), strict=True):
        if value is None or value.shape is None or not value.dtype:
            raise NotIsolated(f"it reads the shape of '{held.name}', which is not known")
        wanted = axes if axes is not None else set(range(len(value.shape)))
        stands.append(tuple(d if i in wanted else 1 for i, d in enumerate(value.shape)))
        unknown = [d for d in stands[-1] if not isinstance(d, int) and not set(d.names) <= known]
        if unknown:
            raise NotIsolated(f"it reads the size {unknown[0]} of '{held.name}'")
    part = cut(model, nodes, [*(v.handle for v in inputs), *shaped], [v.handle for v in outputs])
    run = runner(part)
    names = [v.name for v in inputs]
    zeros: dict[tuple[Any, ...], Tensor] = {}

    def call(data: Sequence[Any]) -> list[Any]:
        sizes = solve([v.shape or () for v in inputs], data)
        feed = dict(zip(names, data, strict=True))
        for value, stand in zip(asked, stands, strict=True):
            assert value is not None
            key = (value.dtype, *(evaluate(d, sizes) for d in stand))
            if key not in zeros:
                zeros[key] = torch.zeros(key[1:], dtype=getattr(torch, value.dtype))  # type: ignore[arg-type]
            feed[value.name] = zeros[key]
        return run(feed)

    return call


def closure(roots: Sequence[ir.Value], stop: set[ir.Value]) -> tuple[set[ir.Node], dict[ir.Value, set[int] | None]]:
    """The nodes that make the roots out of `stop`, and the values outside of which only some axes of the shape are asked."""
    nodes: set[ir.Node] = set()
    shaped: dict[ir.Value, set[int] | None] = {}
    stack = list(roots)
    while stack:
        held = stack.pop()
        node = held.producer()
        if held in stop or (is_given(held) and not held.is_graph_input()):
            continue
        if node is None:
            raise NotIsolated(f"it reads the model input '{held.name}'")
        if node in nodes:
            continue
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise NotIsolated(f"'{node.name}' ({node.op_type}) has a graph of its own")
        nodes.add(node)
        if node.op_type in ("Shape", "Size"):
            (asked,) = node.inputs
            if asked not in stop and asked is not None and not (is_given(asked) and not asked.is_graph_input()):
                axes, before = asked_axes(node), shaped.get(asked, set())
                shaped[asked] = None if axes is None or before is None else axes | before
            continue
        stack += [v for v in node.inputs if v is not None]
    for held in list(shaped):
        if held.producer() in nodes:
            del shaped[held]
    return nodes, shaped


def asked_axes(node: ir.Node) -> set[int] | None:
    """Which axes of the shape are used: those between start and end, or the constant ones gathered; None for all."""
    if node.op_type == "Shape" and "end" in node.attributes:
        return set(range(node.attributes.get_int("start", 0), node.attributes.get_int("end")))
    axes: set[int] = set()
    for user, _ in node.outputs[0].uses():
        chosen = user.inputs[1].const_value if user.op_type == "Gather" and user.inputs[1] is not None else None
        if chosen is None:
            return None
        axes.update(int(i) for i in chosen.numpy().reshape(-1))
    return axes


def cut(model: ir.Model, nodes: set[ir.Node], inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
    """A model of clones of these nodes, in graph order, with constants kept."""
    made: dict[ir.Value, ir.Value] = {}
    for held in inputs:
        made[held] = ir.Value(name=held.name, shape=held.shape and ir.Shape([None] * len(held.shape)), type=held.type)
    constants: dict[str, ir.Value] = {}
    clones = []
    for node in model.graph:
        if node not in nodes:
            continue
        given: list[ir.Value | None] = []
        for held in node.inputs:
            if held is not None and held not in made and held.producer() is None:
                constants[held.name or ""] = made[held] = ir.Value(
                    name=held.name, shape=held.shape, type=held.type, const_value=held.const_value
                )
            given.append(None if held is None else made[held])
        results = [ir.Value(name=o.name, type=o.type) for o in node.outputs]
        made.update(zip(node.outputs, results, strict=True))
        clones.append(ir.Node(node.domain, node.op_type, given, list(node.attributes.values()), outputs=results, name=node.name))
    graph = ir.Graph(
        [made[i] for i in inputs],
        [made[o] for o in outputs],
        nodes=clones,
        initializers=list(constants.values()),
        opset_imports=dict(model.opset_imports),
        name="part",
    )
    return ir.Model(graph, ir_version=model.ir_version)


def solve(shapes: Sequence[Shape], data: Sequence[Tensor]) -> dict[str, int]:
    """Values of the symbols, from the dimensions that are one symbol alone."""
    sizes: dict[str, int] = {}
    for shape, tensor in zip(shapes, data, strict=True):
        for dim, size in zip(shape, tensor.shape, strict=False):
            if not isinstance(dim, int) and dim.coefficient == 1 and len(dim.names) == 1:
                sizes[dim.names[0]] = int(size)
    return sizes
