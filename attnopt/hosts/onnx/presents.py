"""The other outputs of a fused attention that was replaced: present keys and values, made without it.

    y (unread), present_key = Attention(q, k, v, past_key, …)      ->      present_key = Concat(past_key, k)

Left alone, the outputs that are still read would keep the whole old attention alive.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from attnopt.hosts.onnx.builder import OnnxBuilder
from attnopt.hosts.onnx.places import Names, Places
from attnopt.ir.graph import Graph, Value


def make_presents(
    model: ir.Model,
    graph: Graph,
    places: Places,
    names: Names,
    written: list[ir.Node],
    replace: Callable[[Value, Value], None],
) -> None:
    """Write anew what is read of every attention whose result nothing reads any more."""
    fused = {node.name for node in graph.of("attention")}
    held: dict[str, list[Value]] = {}
    for node in graph.nodes:
        if node.name in fused:
            held.setdefault(node.name, []).extend(v for v in node.outputs if v.handle is not None)
    for node in [n for n in model.graph.all_nodes() if n.name in held and len(n.outputs) > 1]:
        if is_read(node.outputs[0]):
            continue
        for value in held[node.name or ""]:
            if value.handle is not node.outputs[0] and is_read(value.handle):
                replace(value, OnnxBuilder(model, places, node, names, written).anew(value))


def is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()
