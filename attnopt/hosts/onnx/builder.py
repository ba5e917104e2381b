"""Writes canonical operations as ONNX nodes, just before a given node, at the model's own opset.

emit("permute", x, perm=(0, 2, 1, 3))                     ->   Transpose(x, perm=[0, 2, 1, 3])
call("com.microsoft::MultiHeadAttention", q, k, v, …)     ->   that node, and the domain among the opset imports
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from attnopt.hosts.onnx.element_types import TYPES, as_onnx
from attnopt.hosts.onnx.lengths import summands
from attnopt.hosts.onnx.places import Names, Places
from attnopt.hosts.onnx.provenance import inherit
from attnopt.hosts.onnx.writers import NAMED, WRITERS
from attnopt.ir.dims import Dim, Shape, Symbol
from attnopt.ir.graph import Value


@dataclass
class OnnxBuilder:
    """Inserts before `before`. Sizes are looked up in `places`, those of the canonical graph; new nodes are noted in `written`.

    `holders` says which new value first has a size that the model had not: how many pages a length begins.
    """

    model: ir.Model
    places: Places
    before: ir.Node
    names: Names
    written: list[ir.Node] = field(default_factory=list)
    sizes: dict[Dim, Value] = field(default_factory=dict)
    made: dict[Value, Value] = field(default_factory=dict)
    holders: dict[Dim, tuple[Value, int]] = field(default_factory=dict)

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
        self,
        op_type: str,
        inputs: Sequence[Value | None],
        shape: Shape,
        dtype: str,
        domain: str = "",
        result: int = 0,
        **attrs: Any,
    ) -> Value:
        """result: which of the outputs is meant, where those before it are not read."""
        given = [None if i is None else self.handle(i) for i in inputs]
        while given and given[-1] is None:
            given.pop()
        folder = (self.before.name or "").rpartition("/")[0]
        name = self.names.unique(f"{folder}/{op_type}" if folder else f"attnopt_{op_type}")
        made = ir.node(op_type, given, attrs, domain=domain, name=name, num_outputs=result + 1)
        inherit(made, self.before, self.written)  # the module and line that it stands for
        for each in made.outputs:
            each.name = self.names.unique(f"{made.name}_output")
        held = made.outputs[result]
        if dtype in TYPES:
            held.type = ir.TensorType(TYPES[dtype])
        held.shape = ir.Shape([d if isinstance(d, int) else str(d) for d in shape])
        self.before.graph.insert_before(self.before, made)  # type: ignore[union-attr]
        self.written.append(made)
        value = Value(held.name, shape, dtype, handle=held)
        for axis, dim in enumerate(shape):
            if not isinstance(dim, int):
                self.holders.setdefault(dim, (value, axis))
        return value

    def handle(self, value: Value) -> ir.Value:
        """The ONNX value; one that exists only in the canonical graph is written now."""
        if value.handle is None:
            if value.load is not None:
                value.handle = self.initializer(value.load())
            else:
                if value not in self.made:
                    self.made[value] = self.anew(value)
                return self.made[value].handle  # type: ignore[no-any-return]
        return value.handle  # type: ignore[no-any-return]

    def anew(self, value: Value) -> Value:
        """Write what exists only in the canonical graph: a size, or a node with all it needs."""
        node = value.producer
        if node is not None:
            attrs = {name: a for name, a in node.attrs.items() if name != "dtype"}
            return self.emit(node.op, *node.inputs, shape=value.shape or (), dtype=value.dtype, **attrs)
        if value.sizes is None:
            raise NotImplementedError(f"{value!r} has no node to read")
        held = self.joined(value.sizes)
        return held if value.shape else self.number(held)

    def number(self, vector: Value) -> Value:
        """The only element of a vector of sizes, without its dimension."""
        return self.node("Squeeze", [vector, self.vector(0)], (), "int64")

    def initializer(self, tensor: Tensor) -> ir.Value:
        name = self.names.unique("attnopt_constant")
        held = ir.Value(name=name, const_value=as_onnx(tensor, name))
        held.type = ir.TensorType(TYPES[str(tensor.dtype).removeprefix("torch.")])
        held.shape = ir.Shape(list(tensor.shape))
        self.model.graph.register_initializer(held)
        return held

    def vector(self, *numbers: int) -> Value:
        return self.constant(torch.tensor(numbers, dtype=torch.int64), "int64")

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
            self.sizes[dim] = self.read_size(dim) or self.computed(dim)
        return self.sizes[dim]

    def computed(self, dim: Dim) -> Value:
        """A size that no value has, as a sum of products of sizes that some value has."""
        sums = summands(dim)
        found: Value | None = None
        for names, count in sums.items():
            if sums == {names: 1} and len(names) == 1:
                if dim in self.holders:
                    return self.along(*self.holders[dim])
                raise NotImplementedError(f"no value has a dimension of size {dim}")
            factors = [self.size(Symbol(1, (name,))) for name in names]
            if abs(count) != 1 or not names:
                factors.append(self.vector(abs(count)))
            term = factors[0]
            for factor in factors[1:]:
                term = self.node("Mul", [term, factor], (1,), "int64")
            if found is None:
                found = term if count > 0 else self.node("Neg", [term], (1,), "int64")
            else:
                found = self.node("Add" if count > 0 else "Sub", [found, term], (1,), "int64")
        assert found is not None
        return found

    def read_size(self, dim: Dim) -> Value | None:
        found = self.places.before(self.before.name or "", dim)
        return None if found is None else self.along(*found)

    def along(self, value: Value, axis: int) -> Value:
        whole = self.node("Shape", [value], (len(value.shape or ()),), "int64")
        return self.node("Gather", [whole, self.vector(axis)], (1,), "int64", axis=0)
