"""One element of a value, as an expression of the indices at which it is read.

    lift(%where [B, 1, Q, K], (b, 0, row, k))     ->     where(load(x0, b, k) & k <= row, 0.0, -3.4e38)

The walk goes from the value up to constants, aranges and what truly is data. Reading a tensor as large as the result would gain
nothing, so arithmetic on such a tensor is left to the graph: the result itself is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attnopt.ir.dims import Dim
from attnopt.ir.expr import Const, Expr, Index, Load, indices, walk
from attnopt.ir.graph import Graph, Value
from attnopt.ir.linear import Linear, length
from attnopt.ir.simplify import Simplifier

DEEPEST = 120  # nodes between a mask and what it is made of
LARGEST = 400  # parts of one expression
STRUCTURE = (
    "where",
    "and",
    "or",
    "not",
    "xor",
    "add",
    "cast",
    "minimum",
    "maximum",
)  # worth reading apart also around whole tensors

Indices = tuple[Expr, ...]


@dataclass
class Lifter:
    """Lifts for one set of sizes of b, h, row and k. `operands` are the tensors that the expressions load, by name."""

    sizes: Mapping[str, Dim]
    operands: dict[str, Value] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    simplifier: Simplifier = field(init=False)
    known: dict[tuple[Value, Indices], Expr] = field(default_factory=dict)
    depth: int = 0

    def __post_init__(self) -> None:
        limits = {name: length(dim) for name, dim in self.sizes.items()}
        self.simplifier = Simplifier(self.dtypes, {n: x + Linear(constant=-1) for n, x in limits.items() if x is not None})

    def lift(self, value: Value, at: Indices) -> Expr:
        """The element of `value` at these indices, one for each dimension."""
        key = (value, at)
        if key not in self.known:
            self.depth += 1
            found = self.read(value, at) if self.depth < DEEPEST else None
            self.depth -= 1
            self.known[key] = self.load(value, at) if found is None else found
        return self.known[key]

    def read(self, value: Value, at: Indices) -> Expr | None:
        from attnopt.patterns.lifting.constants import lift_constant
        from attnopt.patterns.lifting.rules import RULES

        if value.sizes is not None and len(value.sizes) == 1:
            return self.size(value.sizes[0])
        number = value.scalar()
        if number is not None:
            return Const(bool(number) if value.dtype == "bool" else number)
        if value.is_constant:
            return lift_constant(self, value, at)
        node = value.producer
        if node is None or node.op not in RULES or node.output is not value:
            return None
        found = RULES[node.op](self, node, at)
        if found is None or (node.op not in STRUCTURE and self.reads_whole(found) and not is_layout(node.op)):
            return None
        if sum(1 for _ in walk(found)) > LARGEST or self.of_keys_alone(value, found, at):
            return None
        return found

    def of_keys_alone(self, value: Value, found: Expr, at: Indices) -> bool:
        """A condition on data of the key: one mask over the keys, computed once, is what a kernel wants to read."""
        plain = all(i == Const(0) or (isinstance(i, Index) and i.name in "bk") for i in at)
        if value.dtype != "bool" or isinstance(found, Load) or not plain:
            return False
        loads = [e for e in walk(found) if isinstance(e, Load)]
        return bool(loads) and "k" in indices(found) and "row" not in indices(found)

    def reads_whole(self, expr: Expr) -> bool:
        """Whether a tensor over queries and keys is read element by element."""
        return any(
            isinstance(e, Load) and {"row", "k"} <= {i.name for i in e.indices if isinstance(i, Index)} for e in walk(expr)
        )

    def load(self, value: Value, at: Indices) -> Load:
        for name, known in self.operands.items():
            if known is value:
                return Load(name, at)
        name = f"x{len(self.operands)}"
        self.operands[name], self.dtypes[name] = value, value.dtype
        return Load(name, at)

    def size(self, dim: Dim) -> Expr | None:
        """A size of the graph as a sum of its lengths."""
        found = length(dim)
        return None if found is None else found.expr()

    def build(self, op: str, *args: Expr) -> Expr:
        return self.simplifier.build(op, *args)


def is_layout(op: str) -> bool:
    return op in ("permute", "reshape", "expand", "slice", "concat")


@dataclass
class Lifters:
    """The lifters of one graph, one for each set of sizes: layers of equal shape share what was read."""

    graph: Graph
    made: dict[tuple[tuple[str, Dim], ...], Lifter] = field(default_factory=dict)

    def of(self, sizes: Mapping[str, Dim]) -> Lifter:
        key = tuple(sorted(sizes.items()))
        if key not in self.made:
            self.made[key] = Lifter(dict(sizes))
        return self.made[key]
