"""Arithmetic as canonical nodes: what a cache in codes computes at each step, in operators that every runtime has.

    n = Nodes(builder);  n.mul(n.add(codes, zeros), scales)   ->   %add = add(…), %mul = mul(…)      shapes and types follow

Bytes are taken apart by floor and division, exact in float32, because not every runtime shifts and masks bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.dims import Dim, Shape
from attnopt.ir.graph import Value
from attnopt.ir.site import Builder

TRUTHS = ("eq", "lt", "ge", "and", "or")


@dataclass(frozen=True)
class Nodes:
    """Writes through a builder. Values are tensors or plain numbers, of float32 unless said otherwise."""

    builder: Builder

    def binary(self, op: str, a: Value | float | int, b: Value | float | int) -> Value:
        kind = next(x.dtype for x in (a, b) if isinstance(x, Value))
        left, right = (x if isinstance(x, Value) else self.builder.constant(x, kind) for x in (a, b))
        shape = broadcast(left.shape or (), right.shape or ())
        return self.builder.emit(op, left, right, shape=shape, dtype="bool" if op in TRUTHS else kind)

    def add(self, a: Value, b: Value | float) -> Value:
        return self.binary("add", a, b)

    def sub(self, a: Value, b: Value | float) -> Value:
        return self.binary("sub", a, b)

    def mul(self, a: Value, b: Value | float) -> Value:
        return self.binary("mul", a, b)

    def div(self, a: Value, b: Value | float) -> Value:
        return self.binary("div", a, b)

    def clamp(self, x: Value, low: float, high: float) -> Value:
        return self.binary("minimum", self.binary("maximum", x, low), high)

    def unary(self, op: str, x: Value) -> Value:
        return self.builder.emit(op, x, shape=x.shape or (), dtype=x.dtype)

    def where(self, condition: Value, yes: Value | float, no: Value) -> Value:
        chosen = yes if isinstance(yes, Value) else self.builder.constant(yes, no.dtype)
        shape = broadcast(broadcast(condition.shape or (), chosen.shape or ()), no.shape or ())
        return self.builder.emit("where", condition, chosen, no, shape=shape, dtype=no.dtype)

    def cast(self, x: Value, dtype: str) -> Value:
        return x if x.dtype == dtype else self.builder.emit("cast", x, shape=x.shape or (), dtype=dtype)

    def reduced(self, how: str, x: Value, axis: int = -1) -> Value:
        """Along one dimension, which stays with size 1."""
        shape, axis = list(x.shape or ()), axis % len(x.shape or ())
        shape[axis] = 1
        return self.builder.emit(f"reduce_{how}", x, shape=tuple(shape), dtype=x.dtype, axes=(axis,), keepdims=True)

    def permuted(self, x: Value, *perm: int) -> Value:
        return self.builder.emit("permute", x, shape=tuple((x.shape or ())[i] for i in perm), dtype=x.dtype, perm=perm)

    def matmul(self, a: Value, b: Value) -> Value:
        """a [..., M, N] b [..., N, K], of as many dimensions."""
        left, right = a.shape or (), b.shape or ()
        return self.builder.emit("matmul", a, b, shape=(*broadcast(left[:-2], right[:-2]), left[-2], right[-1]), dtype=a.dtype)

    def reshaped(self, x: Value, *shape: Dim) -> Value:
        return x if x.shape == shape else self.builder.emit("reshape", x, shape=shape, dtype=x.dtype)

    def joined(self, parts: Sequence[Value], axis: int, length: Dim) -> Value:
        shape = list(parts[0].shape or ())
        shape[axis] = length
        return parts[0] if len(parts) == 1 else self.builder.emit(
            "concat", *parts, shape=tuple(shape), dtype=parts[0].dtype, axis=axis
        )  # fmt: skip

    def cut(self, x: Value, axis: int, start: Dim, stop: Dim | None, length: Dim, step: int = 1) -> Value:
        shape = list(x.shape or ())
        shape[axis] = length
        return self.builder.emit("slice", x, shape=tuple(shape), dtype=x.dtype, axis=axis, start=start, stop=stop, step=step)

    def taken(self, x: Value, index: Value, axis: int) -> Value:
        """The rows of x at these places of one axis; index [n] of int64."""
        shape = list(x.shape or ())
        shape[axis] = (index.shape or ())[0]
        return self.builder.emit("gather", x, index, shape=tuple(shape), dtype=x.dtype, axis=axis)

    def places(self, length: Dim) -> Value:
        """0, 1, 2, … as int64 [length]."""
        return self.builder.emit("iota", shape=(length,), dtype="int64", start=0, step=1)

    def product(self, x: Value, matrix: Tensor) -> Value:
        """x [..., D] times a constant [D, E], in x's type."""
        held = self.builder.constant(matrix, x.dtype)
        return self.builder.emit("matmul", x, held, shape=(*(x.shape or ())[:-1], matrix.shape[1]), dtype=x.dtype)

    def size(self, length: Dim) -> Value:
        """A size as int64 [1]."""
        if isinstance(length, int):
            return self.builder.constant(torch.tensor([length]), "int64")
        return self.add(self.reduced("max", self.places(length)), 1)

    # Codes of less than 8 bits share a byte: part i of a row in bits i * bits … of each, as `ir.packing` has it.

    def bytes_of(self, codes: Value, bits: int) -> Value:
        """Codes 0 … 2^bits - 1 in float32 [..., D] as uint8 [..., D * bits / 8]."""
        axis, width = len(codes.shape or ()) - 1, whole(codes)
        part = width * bits // 8
        total = self.cut(codes, axis, 0, part, part)
        for i in range(1, 8 // bits):
            total = self.add(total, self.mul(self.cut(codes, axis, i * part, (i + 1) * part, part), float(1 << (bits * i))))
        return self.cast(total, "uint8")

    def codes_of(self, held: Value, bits: int) -> Value:
        """The codes in bytes [..., D * bits / 8], as float32 [..., D]."""
        rest, found = self.cast(held, "float32"), []
        for _ in range(8 // bits - 1):
            above = self.unary("floor", self.mul(rest, 0.5**bits))
            found.append(self.sub(rest, self.mul(above, float(1 << bits))))
            rest = above
        return self.joined([*found, rest], len(held.shape or ()) - 1, whole(held) * 8 // bits)


def whole(x: Value) -> int:
    """The last dimension of x, which must be a number."""
    width = (x.shape or ())[-1]
    assert isinstance(width, int)
    return width


def broadcast(a: Shape, b: Shape) -> Shape:
    """The shape of a result that two shapes share, sizes of 1 repeated."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    shorter = (1,) * (len(longer) - len(shorter)) + shorter
    return tuple(y if x == 1 else x for x, y in zip(longer, shorter, strict=True))
