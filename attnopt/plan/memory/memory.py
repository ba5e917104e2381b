"""What a model holds from call to call under a plan: its weights, and the keys and values of the tokens that it has seen.

    weights   each constant once; int8 where all that reads it reads int8; none where what read it is gone
    cache     of each layer a position's bytes, times the positions of the longest load, times its sequences

Only what the host frees counts: a mask that hides past keys leaves them in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from attnopt.cost.memory import cache_bytes
from attnopt.cost.nodes import bytes_of
from attnopt.ir.block import Block
from attnopt.ir.cost import WIDTHS
from attnopt.ir.graph import Graph, Node, Value
from attnopt.ir.site import Site
from attnopt.plan.options.proposals import Move
from attnopt.rounding.weight_format import WeightFormat

GONE = 0.0


@dataclass(frozen=True)
class Held:
    """Bytes of weights and of caches."""

    weights: float
    cache: float

    @property
    def total(self) -> float:
        return self.weights + self.cache


@dataclass(frozen=True)
class Memory:
    """The memory of one model under any plan. loads: sizes of its symbols; memory must do for the one that holds most."""

    graph: Graph
    sites: Sequence[tuple[Site, Block]]
    loads: Sequence[Mapping[str, int]]
    known: dict[tuple[Move, ...], Held] = field(default_factory=dict)

    @cached_property
    def weights(self) -> float:
        """Bytes of all constants, each once."""
        held = {v for n in self.graph.nodes for v in n.inputs if v is not None and v.is_constant and v.handle is not None}
        return sum(bytes_of(v, {}) for v in held)

    def after(self, moves: Sequence[Move] = ()) -> Held:
        key = tuple(moves)
        if key not in self.known:
            clauses: dict[str, str] = {}
            for move in moves:
                clauses = {**clauses, **move.candidate.cached, **{name: "" for name, text in clauses.items() if text == ""}}
            rows = {name: kept for move in moves for name, kept in move.candidate.rows.items()}
            cache = max((cache_bytes(self.sites, sizes, clauses, rows) for sizes in self.loads), default=0.0)
            self.known[key] = Held(self.weights - freed(moves), cache)
        return self.known[key]

    def saved(self, moves: Sequence[Move]) -> float:
        """Bytes that a plan with these moves holds less."""
        return self.after().total - self.after(moves).total


def freed(moves: Sequence[Move]) -> float:
    """Bytes of weights that moves leave out or store narrower, less copies that they make of what others still read."""
    left: dict[Node, float] = {}
    for move in moves:
        gone = {n.name for n in move.candidate.removes}
        tables = [n for n in move.candidate.nodes if n.op == "gather" and n.name in move.candidate.storage]
        for node in (*touched(move.candidate.removes, move.candidate.storage, move.group.linears), *tables):
            if numbers(node):
                width = GONE if node.name in gone else stored_bits(node, move.candidate.storage[node.name])
                left[node] = min(width, left.get(node, math.inf))
    readers: dict[Value, list[Node]] = {}
    for node in left:
        readers.setdefault(weight_of(node), []).append(node)  # type: ignore[arg-type]
    total = sum(narrowed(move) for move in moves)
    for weight, nodes in readers.items():
        width = WIDTHS.get(weight.dtype, 32)
        stays = width if any(user not in nodes for user in weight.users) else 0
        narrow = max(min(left[n], width) for n in nodes)
        total += numbers(nodes[0]) * (width - stays - narrow) / 8
    return total


def narrowed(move: Move) -> float:
    """Bytes of weights that a move leaves out by making layers smaller."""
    weights = {weight_of(n): n for n in move.group.linears if n.name in move.candidate.layers}
    return sum(
        (numbers(n) - math.prod(move.candidate.layers[n.name])) * WIDTHS.get(w.dtype, 32) / 8
        for w, n in weights.items()
        if w is not None
    )


def stored_bits(node: Node, storage: str) -> float:
    """Bits for each weight of a linear layer or table under a storage, steps included; infinite where nothing is known of it."""
    format, weight = WeightFormat.read(storage), weight_of(node)
    inputs = None if weight is None else (weight.shape or ())[0 if node.op == "matmul" else 1]
    return format.width(inputs) if format is not None and isinstance(inputs, int) else WIDTHS.get(storage, math.inf)


def weight_of(node: Node) -> Value | None:
    """The weight of a linear layer, or the table of a look-up."""
    return node.inputs[1] if node.op in ("linear", "matmul") else node.inputs[0] if node.op == "gather" else None


def touched(removes: Sequence[Node], storage: Mapping[str, str], linears: Sequence[Node]) -> list[Node]:
    """The nodes whose price an option changes, each once."""
    return list({n.name: n for n in (*removes, *(n for n in linears if n.name in storage))}.values())


def numbers(node: Node) -> int:
    """Numbers in the weight of a linear layer, or in a table; 0 for any other node."""
    weight = weight_of(node)
    known = weight is not None and weight.is_constant and all(isinstance(d, int) for d in weight.shape or ())
    return math.prod(weight.shape or ()) if known and weight is not None else 0  # type: ignore[arg-type]
