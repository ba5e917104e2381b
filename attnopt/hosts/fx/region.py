"""A part of an FX graph as a module of its own: what lies between some values and others.

    region(q, k, v -> output)   ->   GraphModule(q, k, v) -> (output,)

Sizes that the part reads from elsewhere in the model are found again in the shapes of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.hosts.fx.symbols import Symbols
from attnopt.ir.dims import Dim, evaluate, solved
from attnopt.ir.graph import Value
from attnopt.ir.site import NotIsolated


def isolate(
    module: fx.GraphModule, symbols: Symbols, inputs: Sequence[Value], outputs: Sequence[Value]
) -> Callable[[Sequence[Any]], list[Any]]:
    """The part between these values. Raises NotIsolated where it needs more than `inputs`."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for value in inputs:
        made[value.handle] = graph.placeholder(value.handle.name)
        made[value.handle].meta = dict(value.handle.meta)
    wanted: dict[Dim, fx.Node] = {}  # sizes that come from outside
    needed = closure([v.handle for v in outputs], set(made))
    for node in module.graph.nodes:
        if node not in needed or node in made:
            continue
        size = node.meta.get("val")
        if isinstance(size, torch.SymInt):
            dim = symbols.dim(size)
            if dim not in wanted:
                wanted[dim] = graph.placeholder(f"size_{len(wanted)}")
            made[node] = wanted[dim]
        elif node.op == "placeholder":
            raise NotIsolated(f"it reads the model input '{node.name}'")
        else:
            made[node] = graph.node_copy(node, lambda n: made[n])
    graph.output(tuple(made[v.handle] for v in outputs))
    ordered(graph)
    part = fx.GraphModule(module, graph)
    shapes = [symbols.shape(v.handle.meta["val"]) for v in inputs]
    known = {d.names[0] for shape in shapes for d in shape if not isinstance(d, int) and len(d.names) == 1}
    for dim in wanted:
        if not isinstance(dim, int) and not known >= set(dim.names):
            raise NotIsolated(f"it reads the size {dim}")

    def call(data: Sequence[Any]) -> list[Any]:
        sizes = solve(shapes, data)
        with torch.no_grad():
            return list(part(*data, *(evaluate(dim, sizes) for dim in wanted)))

    return call


def closure(roots: Sequence[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """The roots and all that they read, up to `stop` and to sizes."""
    found: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        if node not in stop and not isinstance(node.meta.get("val"), torch.SymInt):
            stack += node.all_input_nodes
    return found


def ordered(graph: fx.Graph) -> None:
    """Placeholders first: sizes were met in the middle of the part."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    first = next(iter(graph.nodes))
    for node in placeholders:
        if node is not first:
            first.append(node)
            first = node


def solve(shapes: Sequence[Sequence[Dim]], data: Sequence[Tensor]) -> dict[str, int]:
    """Values of the symbols, from the dimensions that are one symbol or a multiple of it."""
    sizes: dict[str, int] = {}
    for shape, tensor in zip(shapes, data, strict=True):
        for dim, size in zip(shape, tensor.shape, strict=True):
            if (found := solved(dim, int(size))) is not None:
                sizes[found[0]] = found[1]
    return sizes
