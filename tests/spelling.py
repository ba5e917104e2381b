"""Write canonical graphs by hand: a small recorder with shape inference, for tests of recognition."""

from __future__ import annotations

from typing import Any

import torch

from attnopt.ir.dims import Dim, Shape, product, symbol
from attnopt.ir.graph import Graph, Value

B, L = symbol("batch"), symbol("length")


class Recorder:
    """`r.op(...)` appends a node and returns its value; shapes follow torch's rules, symbols included."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.count = 0

    def fresh(self, shape: Shape, dtype: str, name: str = "") -> Value:
        self.count += 1
        return Value(name or f"v{self.count}", shape, dtype)

    def input(self, name: str, *shape: Dim, dtype: str = "float32") -> Value:
        value = self.fresh(shape, dtype, name)
        self.graph.inputs.append(value)
        return value

    def constant(self, data: Any) -> Value:
        tensor = torch.as_tensor(data)
        value = self.fresh(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        value.load = lambda: tensor
        return value

    def node(self, op: str, *inputs: Value, shape: Shape, dtype: str = "float32", **attrs: Any) -> Value:
        out = self.fresh(shape, dtype)
        self.graph.add(op, inputs, (out,), name=f"{op}_{self.count}", **attrs)
        return out

    def weight(self, out: int, width: int) -> Value:
        return self.constant(torch.zeros(out, width))

    def linear(self, x: Value, out: int) -> Value:
        return self.node("linear", x, self.weight(out, int(x.shape[-1])), shape=(*x.shape[:-1], out))

    def reshape(self, x: Value, *shape: Dim) -> Value:
        assert product(shape) == product(x.shape), (shape, x.shape)
        return self.node("reshape", x, shape=shape, dtype=x.dtype)

    def permute(self, x: Value, *perm: int) -> Value:
        return self.node("permute", x, shape=tuple(x.shape[i] for i in perm), dtype=x.dtype, perm=perm)

    def expand(self, x: Value, *shape: Dim) -> Value:
        return self.node("expand", x, shape=shape, dtype=x.dtype)

    def matmul(self, a: Value, b: Value) -> Value:
        lead = self.broadcast(a.shape[:-2], b.shape[:-2])
        return self.node("matmul", a, b, shape=(*lead, a.shape[-2], b.shape[-1]))

    @staticmethod
    def broadcast(a: Shape, b: Shape) -> Shape:
        rank = max(len(a), len(b))
        a, b = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
        return tuple(y if x == 1 else x for x, y in zip(a, b, strict=True))

    def binary(self, op: str, a: Value | float, b: Value | float, dtype: str = "float32") -> Value:
        a, b = (x if isinstance(x, Value) else self.constant(x) for x in (a, b))
        return self.node(op, a, b, shape=self.broadcast(a.shape, b.shape), dtype=dtype)

    def unary(self, op: str, x: Value, dtype: str = "", **attrs: Any) -> Value:
        return self.node(op, x, shape=x.shape, dtype=dtype or x.dtype, **attrs)

    def where(self, c: Value, a: Value | float, b: Value | float) -> Value:
        a, b = (x if isinstance(x, Value) else self.constant(x) for x in (a, b))
        return self.node("where", c, a, b, shape=self.broadcast(c.shape, self.broadcast(a.shape, b.shape)))

    def softmax(self, x: Value, axis: int = -1) -> Value:
        return self.unary("softmax", x, axis=axis)

    def reduce(self, op: str, x: Value, axis: int) -> Value:
        shape = list(x.shape)
        shape[axis] = 1
        return self.node(op, x, shape=tuple(shape), axes=(axis % len(shape),), keepdims=True)

    def output(self, value: Value) -> None:
        self.graph.outputs.append(value)
