"""From an ONNX graph to the canonical graph, with the symbolic shape of every value.

    Transpose(x, perm=[0, 2, 1, 3])  ->  permute(x, perm=(0, 2, 1, 3))        Identity(x), Dropout(x)  ->  x

Each rule of `rules/` translates one operator. Operators without a rule become `opaque`: they stay, and nothing is read into them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from attnopt.hosts.onnx.element_types import as_torch, dtype_name
from attnopt.hosts.onnx.lengths import Vector, broadcast, read_dim, root, summands, total
from attnopt.hosts.onnx.rules import RULES, UNREAD
from attnopt.ir.dims import Dim, Shape, make, symbol
from attnopt.ir.graph import Graph, Source, Value

SMALL = 64  # constants of at most so many elements may hold sizes


def translate(model: ir.Model) -> Graph:
    """The canonical graph; values keep their onnx-ir values as handles.

    Symbols that a broadcast forces to be equal share one name: the graph is read again with the names unified.
    """
    return settled(lambda names: Translation(model, names), {})


def settled(start: Callable[[dict[str, str]], Translation], names: dict[str, str]) -> Graph:
    """The graph of a translation, which is begun again until it finds no more sizes that are equal."""
    while True:
        translation = start(dict(names))
        graph = translation.run()
        found = translation.found_equal
        if found.keys() <= names.keys():
            return graph
        names = {old: root(new, found) for old, new in (names | found).items()}


def apart(dim: Dim, suffix: str) -> Dim:
    """A size under names of its own: past + 1 as past.loop + 1."""
    if not suffix or isinstance(dim, int):
        return dim
    return total({tuple(f"{name}{suffix}" for name in names): count for names, count in summands(dim).items()})


@dataclass
class Translation:
    """The work in progress, on the graph of a model or on a body in it, which reads values of the graph `around` it.

    `reason` is why the rule of this node left an attention opaque. `weights` are the stored matrices whose transposes are multiplied by
    and nothing else, by the transposes. `suffix` sets the sizes apart that a loop states for its own
    values: they may differ from one step to the next, and from what is called alike around it.
    """

    model: ir.Model
    names: dict[str, str]
    body: ir.Graph | None = None
    around: Translation | None = None
    graph: Graph = field(default_factory=Graph)
    values: dict[ir.Value, Value] = field(default_factory=dict)
    weights: dict[Value, Value] = field(default_factory=dict)
    found_equal: dict[str, str] = field(default_factory=dict)
    node: ir.Node = None  # type: ignore[assignment]
    source: Source = Source()
    made: int = 0
    reason: str = ""
    suffix: str = ""

    def run(self) -> Graph:
        body = self.body if self.body is not None else self.model.graph
        for value in body.inputs:
            self.values[value] = Value(value.name or "", self.declared(value), dtype_name(value.dtype), handle=value)
            self.graph.inputs.append(self.values[value])
        for node in body:
            self.visit(node)
        self.graph.outputs = [self.value(v) for v in body.outputs]
        return self.graph

    def visit(self, node: ir.Node) -> None:
        self.node, self.made, self.source, self.reason = node, 0, source_of(node), ""
        if node.op_type == "Constant" and node.domain == "":
            tensor = constant_of(node)
            if tensor is not None:
                self.values[node.outputs[0]] = self.constant(node.outputs[0], tensor)
                return
        rule = RULES.get(operator_name(node))
        inputs = [None if i is None else self.value(i) for i in node.inputs]
        before = len(self.graph.nodes)
        if rule is None or not rule(self, inputs):
            self.undo(before)
            self.opaque(inputs)

    def undo(self, count: int) -> None:
        """Take back all nodes but so many: what a rule made before it gave up."""
        for node in self.graph.nodes[count:]:
            for value in dict.fromkeys(i for i in node.inputs if i is not None):
                value.users.remove(node)
        del self.graph.nodes[count:]

    # Values.

    def value(self, held: ir.Value) -> Value:
        """The canonical value; initializers are made on first use."""
        if held not in self.values:
            if held.const_value is not None and not held.is_graph_input():
                self.values[held] = self.constant(held, held.const_value)
            else:
                self.values[held] = self.captured(held)
        return self.values[held]

    def captured(self, held: ir.Value) -> Value:
        """A value that is made around this body, as an input of it, or as the constant that it is."""
        known = self.around.value(held) if self.around is not None else None
        if known is None:
            return Value(held.name or "", self.declared(held), dtype_name(held.dtype), handle=held)
        shape, sizes = (None if s is None else self.all_renamed(s) for s in (known.shape, known.sizes))
        value = Value(known.name, shape, known.dtype, handle=held, load=known.load, sizes=sizes)
        if known.load is None:
            self.graph.inputs.append(value)
        return value

    def bodies(self) -> dict[str, Graph]:
        """The graphs that this node runs, by the names of its attributes (then_branch, body).

        Sizes that are equal in one branch need not be so in the other, or around both: each has its own names.
        """
        held = {name: a.value for name, a in self.node.attributes.items() if a.type == ir.AttributeType.GRAPH}
        loop = "" if self.node.op_type == "If" else f".{re.sub(r'[^0-9A-Za-z_]', '_', self.node.name or '')}"

        def inner(graph: ir.Graph, names: dict[str, str]) -> Translation:
            return Translation(self.model, names, body=graph, around=self, suffix=self.suffix + loop)

        return {name: settled(partial(inner, graph), self.names) for name, graph in held.items()}

    def constant(self, held: ir.Value, tensor: ir.TensorProtocol) -> Value:
        value = Value(held.name or "", tuple(int(d) for d in tensor.shape), dtype_name(tensor.dtype), handle=held)
        value.load = lambda: as_torch(tensor)
        if tensor.size <= SMALL and len(tensor.shape) <= 1 and tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32):
            value.sizes = tuple(int(x) for x in np.atleast_1d(tensor.numpy()))
        return value

    def number(self, number: float | int | bool, dtype: str) -> Value:
        """A constant of one element that exists only here."""
        data = torch.tensor(number, dtype=getattr(torch, dtype))
        return Value(self.virtual_name(), (), dtype, load=lambda: data)

    def size(self, dim: Dim) -> Value:
        """A size of the graph as a number that exists only here."""
        return Value(self.virtual_name(), (), "int64", sizes=(dim,))

    def declared(self, held: ir.Value) -> Shape | None:
        """The shape that the model states, names unified."""
        if held.shape is None:
            return None
        return tuple(self.dim(d, held, i) for i, d in enumerate(held.shape))

    def dim(self, dim: Any, held: ir.Value, axis: int) -> Dim:
        if isinstance(dim, int):
            return dim
        if dim.value is None:
            return self.renamed(symbol(f"{held.name}.{axis}"))
        return self.renamed(apart(read_dim(str(dim.value)), self.suffix))

    def renamed(self, dim: Dim) -> Dim:
        if isinstance(dim, int) or not self.names:
            return dim
        return make(dim.coefficient, [self.names.get(n, n) for n in dim.names])

    def all_renamed(self, shape: Shape) -> Shape:
        return tuple(map(self.renamed, shape)) if self.names else shape

    # What rules use.

    def attr(self, name: str, default: Any = None) -> Any:
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.value

    @property
    def opset(self) -> int:
        return self.model.opset_imports.get(self.node.domain, 1)

    def held(self, value: Value | None) -> list[Any] | None:
        """The elements of a constant, None where it is computed."""
        return None if value is None or value.load is None else value.load().reshape(-1).tolist()

    def vector(self, value: Value | None) -> Vector | None:
        return None if value is None else value.sizes

    def refuse(self, reason: str) -> bool:
        """Leave this node opaque and say why; for attentions, which recognition then reports."""
        self.reason = reason
        return False

    def emit(self, op: str, *inputs: Value | None, shape: Shape, dtype: str = "", **attrs: Any) -> Value:
        """A node that exists only in the canonical graph; its value has no handle."""
        known = dtype or next((i.dtype for i in inputs if i is not None), "")
        value = Value(self.virtual_name(), self.all_renamed(shape), known)
        self.graph.add(op, inputs, (value,), name=self.node.name or "", source=self.source, **attrs)
        return value

    def result(self, op: str, *inputs: Value | None, shape: Shape | None, dtype: str = "", output: int = 0, **attrs: Any) -> bool:
        """The canonical node that makes one output of the ONNX node. Where no shape is known, the declared one holds."""
        held = self.node.outputs[output]
        known = dtype_name(held.dtype) or dtype or next((i.dtype for i in inputs if i is not None), "")
        found = self.all_renamed(shape) if shape is not None else self.declared(held)
        value = Value(held.name or "", found, known, handle=held)
        self.graph.add(op, inputs, (value,), name=self.node.name or "", source=self.source, **attrs)
        self.values[held] = value
        return True

    def same(self, value: Value | None, output: int = 0) -> bool:
        """The ONNX node does nothing: it stands for its input."""
        if value is None:
            return False
        self.values[self.node.outputs[output]] = value
        return True

    def outside(self, shape: Shape) -> Value:
        """The first output as a value that no canonical node makes."""
        held = self.node.outputs[0]
        self.values[held] = Value(held.name or "", shape, dtype_name(held.dtype) or "int64", handle=held)
        return self.values[held]

    def opaque(self, inputs: Sequence[Value | None]) -> None:
        captured = [self.value(v) for v in captured_values(self.node)]
        outputs = []
        for held in self.node.outputs:
            outputs.append(Value(held.name or "", self.declared(held), dtype_name(held.dtype), handle=held))
            self.values[held] = outputs[-1]
        given = (*(i for i in inputs if i is not None), *captured)
        operator = operator_name(self.node)
        reason = self.reason or UNREAD.get(operator, "")
        told: dict[str, Any] = {"reason": reason} if reason else {}
        if bodies := self.bodies():
            told["bodies"] = bodies
        self.graph.add("opaque", given, tuple(outputs), name=self.node.name or "", source=self.source, operator=operator, **told)

    def broadcast(self, *values: Value | None) -> Shape | None:
        shapes = [v.shape for v in values if v is not None]
        return None if any(s is None for s in shapes) else broadcast(shapes, self.found_equal)  # type: ignore[arg-type]

    def virtual_name(self) -> str:
        self.made += 1
        return f"{self.node.name}:{self.made}"


def operator_name(node: ir.Node) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def constant_of(node: ir.Node) -> ir.TensorProtocol | None:
    """What a Constant node holds, in whichever attribute it is written."""
    if node.outputs[0].const_value is not None:
        return node.outputs[0].const_value
    for name, kind in (
        ("value_float", np.float32),
        ("value_int", np.int64),
        ("value_floats", np.float32),
        ("value_ints", np.int64),
    ):
        if name in node.attributes:
            return ir.Tensor(np.array(node.attributes[name].value, dtype=kind))
    attribute = node.attributes.get("value")
    return None if attribute is None else attribute.as_tensor()


def captured_values(node: ir.Node) -> Iterator[ir.Value]:
    """Values of this graph that the subgraphs of a node (If, Loop, Scan) read."""
    for attribute in node.attributes.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            graphs = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else attribute.value
            for graph in graphs:
                for inner in graph.all_nodes():
                    yield from (v for v in inner.inputs if v is not None and v.graph is node.graph)
                yield from (v for v in graph.outputs if v.graph is node.graph)


def source_of(node: ir.Node) -> Source:
    """Module path and line where the exporter wrote them down, else what the node's name tells."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    trace = node.metadata_props.get("pkg.torch.onnx.stack_trace", "")
    module = module_of_scopes(scopes) if scopes else ".".join(part for part in (node.name or "").split("/")[1:-1] if part)
    places = [line.strip() for line in trace.splitlines() if line.strip().startswith("File")]
    line = ""
    if places:
        parts = places[-1].removeprefix("File ").split(", ")
        line = f"{parts[0].strip(chr(34)).rsplit('/', 1)[-1]}:{parts[1].removeprefix('line ')}" if len(parts) > 1 else ""
    return Source(module, line)


def module_of_scopes(scopes: str) -> str:
    """The innermost module of "['', 'encoder', 'encoder.layer.0', 'softmax']": the last entry is the operation itself."""
    names = [name.strip(" '\"[]") for name in scopes.split(",")]
    return next((name for name in reversed(names[:-1]) if name), "")
