"""Rotation of queries and keys as canonical nodes: what a block reads of positions and frequencies, written for other heads.

    x [B, H, L, D], positions [B | 1, L]   ->   cat(a cos - b sin, b cos + a sin)       a, b = halves, or neighbours, of what turns

Cosines and sines that stand in the graph already, from a block that was written before, are read again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnopt.ir.block import Rotary
from attnopt.ir.dims import Dim
from attnopt.ir.graph import Graph, Node, Value
from attnopt.ir.site import Builder, Refusal
from attnopt.passes.edits.caches.nodes import Nodes


def refuses_rotary(rotary: Rotary) -> Refusal | None:
    """Why its angles cannot be written anew; None where they can."""
    held = None if rotary.positions is None else rotary.positions.value
    if held is not None and len(held.shape or ()) not in (1, 2):
        return Refusal(f"positions {held!r} are not [batch, length]", held.producer)
    return None


def counts_from(rotary: Rotary, past: Dim) -> bool:
    """Whether the new rows stand right behind `past` rows that are counted from zero."""
    if rotary.positions is None:
        return False
    held, made = rotary.positions.value, rotary.positions.value.producer
    if held.sizes is not None:
        return held.sizes == (past,)
    if made is not None and made.op == "add":
        return any(v is not None and v.sizes == (past,) for v in made.inputs) and any(counts(v) for v in made.inputs)
    return made is not None and made.op == "iota" and (made.attrs["start"], made.attrs["step"]) == (past, 1)


def counts(value: Value | None) -> bool:
    """Whether a value is 0, 1, 2, …"""
    if value is None:
        return False
    made = value.producer
    return value.sizes == (0,) or (made is not None and made.op == "iota" and (made.attrs["start"], made.attrs["step"]) == (0, 1))


def waves(builder: Builder, graph: Graph, rotary: Rotary, before: Node, length: Dim | None = None) -> tuple[Value, Value]:
    """Cosines and sines [B | 1, 1, L, dims / 2]. length: of rows counted from zero, in place of the block's own positions."""
    positions = None if rotary.positions is None or length is not None else rotary.positions.value
    for angle in made_already(graph, rotary.inv_freq, before):
        if (read_from(angle) is positions and positions is not None) or counts_to(angle, length):
            found = {op: next((n.output for n in angle.output.users if n.op == op), None) for op in ("cos", "sin")}
            if found["cos"] is not None and found["sin"] is not None:
                return found["cos"], found["sin"]
    n = Nodes(builder)
    if positions is None:
        assert length is not None
        column = n.reshaped(n.cast(n.places(length), "float32"), 1, 1, length, 1)
    else:
        shape = positions.shape or ()
        column = n.reshaped(n.cast(positions, "float32"), shape[0] if len(shape) == 2 else 1, 1, shape[-1], 1)
    angles = n.mul(column, builder.constant(rotary.inv_freq.reshape(1, 1, 1, -1), "float32"))
    return n.unary("cos", angles), n.unary("sin", angles)


def made_already(graph: Graph, inv_freq: Tensor, before: Node) -> Iterator[Node]:
    """The products of positions and these frequencies that stand before a node."""
    for node in graph.nodes:
        if node is before:
            return
        if node.op == "mul" and len(node.output.shape or ()) == 4:
            held = [v.load() for v in node.inputs if v is not None and v.load is not None]
            if held and held[0].numel() == inv_freq.numel() and torch.equal(held[0].flatten(), inv_freq.flatten()):
                yield node


def read_from(angle: Node) -> Value | None:
    value = next((v for v in angle.inputs if v is not None and not v.is_constant), None)
    while value is not None and value.producer is not None and value.producer.op in ("reshape", "cast"):
        value = value.producer.inputs[0]
    return value


def counts_to(angle: Node, length: Dim | None) -> bool:
    value = read_from(angle)
    return length is not None and value is not None and counts(value) and value.shape == (length,)


def turned(builder: Builder, rotary: Rotary, x: Value, cos: Value, sin: Value) -> Value:
    """x [B, H, L, D] with its channels turned."""
    n = Nodes(builder)
    width, dims, first = int((x.shape or ())[3]), rotary.dims, rotary.first  # type: ignore[arg-type]
    cos, sin = (n.cast(w if rotary.scaling == 1.0 else n.mul(w, rotary.scaling), x.dtype) for w in (cos, sin))
    half = dims // 2
    if rotary.interleaved:
        a, b = (n.cut(x, 3, first + at, first + dims, half, 2) for at in (0, 1))
    else:
        a, b = n.cut(x, 3, first, first + half, half), n.cut(x, 3, first + half, first + dims, half)
    one, two = n.sub(n.mul(a, cos), n.mul(b, sin)), n.add(n.mul(b, cos), n.mul(a, sin))
    if rotary.interleaved:
        lead = (x.shape or ())[:3]
        made = n.reshaped(n.joined([n.reshaped(y, *lead, half, 1) for y in (one, two)], 4, 2), *lead, dims)
    else:
        made = n.joined([one, two], 3, dims)
    parts = [made]
    if first:
        parts.insert(0, n.cut(x, 3, 0, first, first))
    if first + dims < width:
        parts.append(n.cut(x, 3, first + dims, width, width - first - dims))
    return n.joined(parts, 3, width)
