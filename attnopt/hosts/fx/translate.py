"""From an FX graph of ATen operators to the canonical graph.

    aten.transpose.int(x, 1, 2)  ->  permute(x, perm=(0, 2, 1, 3))        aten.dropout(x, 0.1, False)  ->  x

State that the program writes at its end (`copy_` into a buffer) is an input of the graph, and what is written one of its outputs.

Each rule of `rules/` translates one operator. Operators without a rule become `opaque`: they stay, and nothing is read into them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.hosts.fx.rules import RULES
from attnopt.hosts.fx.rules.complex import RULES as COMPLEX
from attnopt.hosts.fx.rules.complex import Pair, is_complex
from attnopt.hosts.fx.state import writes_state, written
from attnopt.hosts.fx.symbols import Symbols, name_symbols
from attnopt.ir.dims import Dim, Shape
from attnopt.ir.graph import Graph, Source, Value


def translate(module: fx.GraphModule) -> Graph:
    """The canonical graph of a flat module; values keep their FX nodes as handles."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    translation = Translation(module, name_symbols(placeholders), state=frozenset(written(module)))
    for node in module.graph.nodes:
        translation.visit(node)
    return translation.graph


@dataclass
class Translation:
    """The work in progress: `node` is the FX node being translated, `values` what each FX node stands for."""

    module: fx.GraphModule
    symbols: Symbols
    state: frozenset[str] = frozenset()
    updates: list[Value] = field(default_factory=list)
    graph: Graph = field(default_factory=Graph)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    node: fx.Node = None  # type: ignore[assignment]
    source: Source = Source()
    made: int = 0

    def visit(self, node: fx.Node) -> None:
        self.node, self.made = node, 0
        if node.op == "placeholder":
            if isinstance(node.meta.get("val"), Tensor):
                self.values[node] = self.fresh_result()
                self.graph.inputs.append(self.values[node])
        elif node.op == "get_attr":
            self.attribute(node)
        elif node.op == "output":
            returned = [self.values[n] for n in node.args[0] if isinstance(self.values.get(n), Value)]  # type: ignore[union-attr]
            self.graph.outputs = [*returned, *self.updates]
        elif node.op == "call_function":
            self.source = source_of(node)
            self.call(node)
        else:
            self.opaque()

    def call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            whole = self.values.get(node.args[0])  # type: ignore[arg-type]
            if isinstance(whole, list):
                self.values[node] = whole[node.args[1]]  # type: ignore[call-overload]
                if self.values[node].handle is None:
                    self.values[node].handle = node
            else:
                self.opaque()
            return
        if node.target is torch.ops.aten.copy_.default and writes_state(node):
            self.updates += [v for v in (self.values.get(node.args[1]),) if isinstance(v, Value)]  # type: ignore[arg-type]
            return
        if not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            return  # sizes and checks: they live in shapes
        rule = (COMPLEX if is_complex(self, node) else RULES).get(operator_name(node.target))
        if rule is None or not rule(self, bound(node)):
            self.opaque()

    def attribute(self, node: fx.Node) -> None:
        data: Any = self.module
        for part in str(node.target).split("."):
            data = getattr(data, part)
        if isinstance(data, Tensor):
            value = Value(node.name, tuple(data.shape), dtype_name(data.dtype), handle=node)
            if node.target in self.state:
                self.graph.inputs.append(value)
            else:
                value.load = lambda: data.detach().cpu()  # read beside tensors that are computed here
            self.values[node] = value

    # What rules use.

    def value(self, argument: Any, like: Value | None = None) -> Value | None:
        """The value of an argument: that of a node, or a constant of one element for a number."""
        if argument is None:
            return None
        if isinstance(argument, fx.Node):
            known = self.values.get(argument)
            if isinstance(known, Value):
                return known
            held = argument.meta.get("val")
            sizes = (self.symbols.dim(held),) if isinstance(held, torch.SymInt) else None
            return Value(argument.name, (), "int64", handle=argument, sizes=sizes)  # a size as a number
        if isinstance(argument, (bool, int, float)):
            data = torch.tensor(argument)
            return Value(self.virtual_name(), (), dtype_name(data.dtype), load=lambda: data)
        return None

    def emit(self, op: str, *inputs: Value | None, shape: Shape, dtype: str = "", **attrs: Any) -> Value:
        """A node that exists only in the canonical graph; its value has no handle."""
        known = dtype or next((i.dtype for i in inputs if i is not None), "")
        value = Value(self.virtual_name(), shape, known)
        self.graph.add(op, inputs, (value,), name=self.node.name, source=self.source, **attrs)
        return value

    def result(self, op: str, *inputs: Value | None, **attrs: Any) -> bool:
        """The canonical node that makes what the FX node makes."""
        value = self.fresh_result()
        self.graph.add(op, inputs, (value,), name=self.node.name, source=self.source, **attrs)
        self.values[self.node] = value
        return True

    def same(self, value: Value | None) -> bool:
        """The FX node does nothing: it stands for its input."""
        self.values[self.node] = value
        return value is not None

    def results(self, values: Sequence[Value]) -> bool:
        """The FX node makes several values, picked by getitem."""
        self.values[self.node] = list(values)
        return True

    def opaque(self) -> None:
        read = [self.values.get(n) for n in self.node.all_input_nodes]
        inputs = tuple(v for r in read for v in ((r.re, r.im) if isinstance(r, Pair) else (r,)) if isinstance(v, Value))
        made = self.node.meta.get("val")
        if isinstance(made, (tuple, list)):
            several = tuple(self.fresh_result(part, f".{i}", handle=False) for i, part in enumerate(made))
            self.values[self.node] = list(several)
        else:
            several = (self.fresh_result(),)
            self.values[self.node] = several[0]
        self.graph.add(
            "opaque", inputs, several, name=self.node.name, source=source_of(self.node), operator=str(self.node.target)
        )

    @property
    def shape(self) -> Shape:
        """The shape of what the FX node makes."""
        return self.symbols.shape(self.node.meta["val"])

    def dim(self, size: Any) -> Dim:
        """A size argument: an int, or a node that holds a symbolic size."""
        return self.symbols.dim(size.meta["val"] if isinstance(size, fx.Node) else size)

    def fresh_result(self, made: Any = None, suffix: str = "", handle: bool = True) -> Value:
        tensor = self.node.meta.get("val") if made is None else made
        known = isinstance(tensor, Tensor)
        shape = self.symbols.shape(tensor) if known else None
        name = f"{self.node.name}{suffix}"
        return Value(name, shape, dtype_name(tensor.dtype) if known else "", handle=self.node if handle else None)

    def virtual_name(self) -> str:
        self.made += 1
        return f"{self.node.name}:{self.made}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def operator_name(target: Any) -> str:
    """ "aten.add" for aten.add.Tensor: overloads share a rule."""
    packet = getattr(target, "overloadpacket", None)
    return "" if packet is None else f"{target.namespace}.{packet.__name__}"


def bound(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by the names of its schema, defaults filled in."""
    arguments: dict[str, Any] = {}
    for i, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if i < len(node.args):
            arguments[parameter.name] = node.args[i]
        elif parameter.name in node.kwargs:
            arguments[parameter.name] = node.kwargs[parameter.name]
        else:
            arguments[parameter.name] = parameter.default_value if parameter.has_default_value() else None
    return arguments


def source_of(node: fx.Node) -> Source:
    """The innermost module path and the innermost line of the model's code."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(list(stack.values())) if entry), "")
    trace = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File")]
    line = trace[-1] if trace else ""
    if line:
        parts = line.removeprefix("File ").split(", ")
        line = f"{parts[0].strip(chr(34)).rsplit('/', 1)[-1]}:{parts[1].removeprefix('line ')}" if len(parts) > 1 else line
    return Source(str(path), line)
