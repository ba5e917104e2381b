"""Writes canonical operations as ONNX nodes, just before a given node, at the model's own opset.

emit("permute", x, perm=(0, 2, 1, 3))                     ->   Transpose(x, perm=[0, 2, 1, 3])
call("com.microsoft::MultiHeadAttention", q, k, v, …)     ->   that node, and the domain among the opset imports
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from attnopt.hosts.onnx.element_types import TYPES, as_onnx
from attnopt.ir.dims import Dim, Shape, Symbol, parts
from attnopt.ir.graph import Graph, Value

NAMED = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow", "maximum": "Max", "minimum": "Min", "eq": "Equal",
    "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual", "and": "And", "or": "Or", "xor": "Xor", "not": "Not",
    "neg": "Neg", "abs": "Abs", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "reciprocal": "Reciprocal", "tanh": "Tanh",
    "sigmoid": "Sigmoid", "relu": "Relu", "erf": "Erf", "sin": "Sin", "cos": "Cos", "floor": "Floor", "isnan": "IsNaN",
    "where": "Where", "matmul": "MatMul", "mod": "Mod",
}  # fmt: skip


@dataclass
class OnnxBuilder:
    """Inserts before `before`. `graph` is the canonical graph, where sizes are looked up."""

    model: ir.Model
    graph: Graph
    before: ir.Node
    names: set[str]
    sizes: dict[Dim, Value] = field(default_factory=dict)

    def emit(self, op: str, *inputs: Value | None, shape: Shape, dtype: str = "", **attrs: Any) -> Value:
        known = dtype or next((i.dtype for i in inputs if i is not None), "")
        writer = WRITERS.get(op)
        if writer is not None:
            return writer(self, list(inputs), shape, known, attrs)
        if op not in NAMED:
            raise NotImplementedError(f"the ONNX host writes no '{op}'")
        return self.node(NAMED[op], inputs, shape, known)

    def call(self, target: Any, *inputs: Any, shape: Shape, dtype: str = "", **attrs: Any) -> Value:
        domain, _, name = str(target).rpartition("::")
        if domain and domain not in self.model.opset_imports:
            self.model.opset_imports[domain] = 1
        return self.node(name, inputs, shape, dtype, domain=domain, **attrs)

    def constant(self, data: Tensor | float | int | bool, dtype: str) -> Value:
        tensor = torch.as_tensor(data).to(getattr(torch, dtype))
        held = self.initializer(tensor)
        return Value(held.name or "", tuple(tensor.shape), dtype, handle=held, load=lambda: tensor)

    # Below: nodes, names, sizes.

    def node(
        self, op_type: str, inputs: Sequence[Value | None], shape: Shape, dtype: str, domain: str = "", **attrs: Any
    ) -> Value:
        given = [None if i is None else self.handle(i) for i in inputs]
        while given and given[-1] is None:
            given.pop()
        folder = (self.before.name or "").rpartition("/")[0]
        name = self.unique(f"{folder}/{op_type}" if folder else f"attnopt_{op_type}")
        made = ir.node(op_type, given, attrs, domain=domain, name=name)
        made.metadata_props.update(self.before.metadata_props)  # the module and line that it stands for
        held = made.outputs[0]
        held.name = self.unique(f"{made.name}_output")
        if dtype in TYPES:
            held.type = ir.TensorType(TYPES[dtype])
        held.shape = ir.Shape([d if isinstance(d, int) else str(d) for d in shape])
        self.before.graph.insert_before(self.before, made)  # type: ignore[union-attr]
        return Value(held.name, shape, dtype, handle=held)

    def handle(self, value: Value) -> ir.Value:
        """The ONNX value; one that exists only in the canonical graph is written now."""
        if value.handle is None:
            if value.load is not None:
                value.handle = self.initializer(value.load())
            elif value.producer is None:
                raise NotImplementedError(f"{value!r} has no node to read")
            else:
                node = value.producer
                return self.emit(node.op, *node.inputs, shape=value.shape or (), dtype=value.dtype, **node.attrs).handle  # type: ignore[no-any-return]
        return value.handle  # type: ignore[no-any-return]

    def initializer(self, tensor: Tensor) -> ir.Value:
        name = self.unique("attnopt_constant")
        held = ir.Value(name=name, const_value=as_onnx(tensor, name))
        held.type = ir.TensorType(TYPES[str(tensor.dtype).removeprefix("torch.")])
        held.shape = ir.Shape(list(tensor.shape))
        self.model.graph.register_initializer(held)
        return held

    def vector(self, *numbers: int) -> Value:
        return self.constant(torch.tensor(numbers, dtype=torch.int64), "int64")

    def unique(self, wanted: str) -> str:
        name, count = wanted, 0
        while name in self.names:
            count += 1
            name = f"{wanted}_{count}"
        self.names.add(name)
        return name

    def target(self, shape: Shape, source: Shape | None) -> Value:
        """The vector of sizes for a Reshape: 0 copies a dimension, -1 is the only other unknown one, else computed."""
        sizes: list[Dim] = [
            0 if not isinstance(d, int) and source is not None and i < len(source) and source[i] == d else d
            for i, d in enumerate(shape)
        ]
        unknown = [i for i, d in enumerate(sizes) if not isinstance(d, int)]
        if len(unknown) == 1:
            sizes[unknown[0]] = -1
        if all(isinstance(d, int) for d in sizes):
            return self.vector(*sizes)  # type: ignore[arg-type]
        return self.joined(shape)

    def joined(self, shape: Shape) -> Value:
        """The sizes as one int64 vector, those that are symbols read when the model runs."""
        if all(isinstance(d, int) for d in shape):
            return self.vector(*shape)  # type: ignore[arg-type]
        pieces = [self.vector(d) if isinstance(d, int) else self.size(d) for d in shape]
        return pieces[0] if len(pieces) == 1 else self.node("Concat", pieces, (len(shape),), "int64", axis=0)

    def size(self, dim: Dim) -> Value:
        """One size as an int64 vector of one element."""
        if isinstance(dim, int):
            return self.vector(dim)
        if dim not in self.sizes:
            found = self.read_size(dim)
            if found is None:
                coefficient, names = parts(dim)
                if len(names) == 1 and coefficient == 1:
                    raise NotImplementedError(f"no value has a dimension of size {dim}")
                found = self.size(Symbol(1, names[:1]))
                for name in names[1:]:
                    found = self.node("Mul", [found, self.size(Symbol(1, (name,)))], (1,), "int64")
                if coefficient != 1:
                    found = self.node("Mul", [found, self.vector(coefficient)], (1,), "int64")
            self.sizes[dim] = found
        return self.sizes[dim]

    def read_size(self, dim: Dim) -> Value | None:
        for value in self.readable():
            if value.shape is not None and dim in value.shape:
                axis = value.shape.index(dim)
                whole = self.node("Shape", [value], (len(value.shape),), "int64")
                return self.node("Gather", [whole, self.vector(axis)], (1,), "int64", axis=0)
        return None

    def readable(self) -> list[Value]:
        """Values that exist before the place of insertion: the inputs first, then what earlier nodes make."""
        values = list(self.graph.inputs)
        for node in self.graph.nodes:
            if node.name == self.before.name:
                break
            values += [v for v in node.outputs if v.handle is not None]
        return values


Writer = Callable[["OnnxBuilder", list[Any], Shape, str, dict[str, Any]], Value]


def reshape(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("Reshape", [x[0], b.target(shape, x[0].shape)], shape, dtype)


def permute(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("Transpose", x, shape, dtype, perm=list(a["perm"]))


def expand(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    source = (1,) * (len(shape) - len(x[0].shape)) + x[0].shape
    return b.node("Expand", [x[0], b.joined(tuple(1 if s == d else d for s, d in zip(source, shape, strict=True)))], shape, dtype)


def cast(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("Cast", x, shape, dtype, to=int(TYPES[dtype]))


def reduction(op_type: str, axes_as_input_from: int) -> Writer:
    def write(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
        keep = int(a["keepdims"])
        if b.model.opset_imports.get("", 1) >= axes_as_input_from:
            return b.node(op_type, [x[0], b.vector(*a["axes"])], shape, dtype, keepdims=keep)
        return b.node(op_type, x, shape, dtype, axes=list(a["axes"]), keepdims=keep)

    return write


def softmax(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("Softmax", x, shape, dtype, axis=a["axis"])


def slice_(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    if a["start"] is None or a["step"] is None:
        raise NotImplementedError("a slice whose bounds are computed")
    stop = a["stop"] if a["stop"] is not None else 1 << 62
    return b.node("Slice", [x[0], b.vector(a["start"]), b.vector(stop), b.vector(a["axis"]), b.vector(a["step"])], shape, dtype)


def concat(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("Concat", x, shape, dtype, axis=a["axis"])


def gather(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("Gather", x, shape, dtype, axis=a["axis"])


def iota(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    start, step = a.get("start", 0), a.get("step", 1)
    if (start, step) != (0, 1):
        raise NotImplementedError("a range that does not count from 0")
    (length,) = shape
    limit = (
        b.constant(length, "int64") if isinstance(length, int) else b.node("Squeeze", [b.size(length), b.vector(0)], (), "int64")
    )
    made = b.node("Range", [b.constant(0, "int64"), limit, b.constant(1, "int64")], shape, "int64")
    return made if dtype in ("", "int64") else cast(b, [made], shape, dtype, {})


def full(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("Expand", [b.constant(a["value"], dtype), b.joined(shape)], shape, dtype)


def triangle(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("Trilu", [x[0], b.constant(a["diagonal"], "int64")], shape, dtype, upper=int(a["upper"]))


def not_equal(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    return b.node("Not", [b.node("Equal", x, shape, "bool")], shape, "bool")


def floor_division(b: OnnxBuilder, x: list[Any], shape: Shape, dtype: str, a: dict[str, Any]) -> Value:
    """Of integers that are never negative, where dividing towards zero is the same."""
    return b.node("Div", x, shape, dtype)


WRITERS: dict[str, Writer] = {
    "reshape": reshape,
    "permute": permute,
    "expand": expand,
    "cast": cast,
    "reduce_sum": reduction("ReduceSum", 13),
    "reduce_mean": reduction("ReduceMean", 18),
    "reduce_max": reduction("ReduceMax", 18),
    "reduce_min": reduction("ReduceMin", 18),
    "softmax": softmax,
    "slice": slice_,
    "concat": concat,
    "gather": gather,
    "iota": iota,
    "full": full,
    "triangle": triangle,
    "ne": not_equal,
    "floordiv": floor_division,
}
