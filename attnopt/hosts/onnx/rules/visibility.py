"""Which keys a query sees, as canonical nodes over aranges: what fused attentions say with attributes and lengths.

is_causal=1, past of P keys     ->   le(iota(K), iota(Q, start=P)[:, None])
left_window_size=2              ->   lt(q - k, 3)
key lengths [B]                 ->   lt(iota(K), lengths[:, None, None, None])
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from attnopt.hosts.onnx.lengths import add, broadcast
from attnopt.ir.dims import Dim
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation


def binary(t: Translation, op: str, a: Value, b: Value, dtype: str = "") -> Value:
    """An element-wise node of its own."""
    return t.emit(op, a, b, shape=broadcast([a.shape or (), b.shape or ()]), dtype=dtype)


def key_positions(t: Translation, keys: Dim) -> Value:
    """[K]: 0, 1, 2, …"""
    return t.emit("iota", shape=(keys,), dtype="int64", start=0, step=1)


def query_positions(t: Translation, queries: Dim, past: Dim = 0) -> Value:
    """[Q, 1]: absolute positions, which follow those of the past."""
    line = t.emit("iota", shape=(queries,), dtype="int64", start=past, step=1)
    return t.emit("reshape", line, shape=(queries, 1))


def per_batch(t: Translation, lengths: Value) -> Value | None:
    """[B] or [B, 1] integers as int64 [B, 1, 1, 1]."""
    shape = lengths.shape or ()
    if not shape or any(d != 1 for d in shape[1:]):
        return None
    wide = lengths if lengths.dtype == "int64" else t.emit("cast", lengths, shape=shape, dtype="int64")
    if wide is not lengths:
        t.graph.nodes[-1].attrs["dtype"] = "int64"
    return t.emit("reshape", wide, shape=(shape[0], 1, 1, 1))


def causal(t: Translation, queries: Value, keys: Value) -> Value:
    return binary(t, "le", keys, queries, "bool")


def within_left(t: Translation, queries: Value, keys: Value, size: int) -> Value:
    """At most `size` keys before the query's own."""
    return binary(t, "le", binary(t, "sub", queries, keys), t.number(size, "int64"), "bool")


def within_right(t: Translation, queries: Value, keys: Value, size: int) -> Value:
    return binary(t, "le", binary(t, "sub", keys, queries), t.number(size, "int64"), "bool")


def before(t: Translation, keys: Value, lengths: Value) -> Value:
    """Keys below a length per batch row [B, 1, 1, 1]."""
    return binary(t, "lt", keys, lengths, "bool")


def every(t: Translation, *conditions: Value | None) -> Value | None:
    """a & b & …, the absent left out; None where nothing is left."""
    result: Value | None = None
    for condition in conditions:
        if condition is not None:
            result = condition if result is None else binary(t, "and", result, condition, "bool")
    return result


def filled(t: Translation, visible: Value, dtype: str, fill: float, kept: Value | None = None) -> Value:
    """A float tensor to add to scores: `kept` (or zero) where the key is visible, `fill` elsewhere."""
    zero = kept if kept is not None else t.number(0.0, dtype)
    shape = broadcast([visible.shape or (), zero.shape or ()])
    return t.emit("where", visible, zero, t.number(fill, dtype), shape=shape, dtype=dtype)


def as_mask(t: Translation, visible: Value | None, bias: Value | None, dtype: str) -> Value | None:
    """What an `attention` node takes: the condition alone, the bias alone, or the bias with minus infinity where hidden."""
    if visible is None or bias is None:
        return visible if bias is None else bias
    return filled(t, visible, dtype, -math.inf, bias)


def uniform(value: Value | None) -> Dim | None:
    """The one size that every element of an integer tensor is known to be, None where it is data."""
    while value is not None:
        if value.sizes and len(set(value.sizes)) == 1:
            return value.sizes[0]
        if value.load is not None:
            numbers = set(value.load().reshape(-1).tolist())
            return int(numbers.pop()) if len(numbers) == 1 else None
        node = value.producer
        if node is None:
            return None
        counted = node.inputs[0].producer if node.inputs and node.inputs[0] is not None else None
        if node.op == "reduce_max" and counted is not None and counted.op == "iota" and counted.output.shape:
            start, step = counted.attrs["start"], counted.attrs["step"]  # the last of an arange
            return add(counted.output.shape[0], -1) if start == 0 and step == 1 else None
        if node.op in ("add", "sub") and all(i is not None for i in node.inputs):
            left, right = (uniform(i) for i in node.inputs)
            return None if left is None or right is None else add(left, right, 1 if node.op == "add" else -1)
        if node.op not in ("cast", "reshape", "expand"):
            return None
        value = node.inputs[0]
    return None
