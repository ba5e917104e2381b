"""Sizes of tensor dimensions: an int, or a product of symbols such as 12*batch.

    product([Dim(1, ("batch",)), 12])  ->  12*batch         divide(12*batch, batch)  ->  12

Products are all that layouts need; a sum (past + 1) is one opaque symbol named by its text.
"""

from __future__ import annotations

import ast
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Union

ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
}  # fmt: skip


@dataclass(frozen=True)
class Symbol:
    """coefficient * product of names (sorted, repeated for powers)."""

    coefficient: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        text = "*".join(self.names)
        return text if self.coefficient == 1 else f"{self.coefficient}*{text}"


Dim = Union[int, Symbol]
Shape = tuple[Dim, ...]


def symbol(name: str) -> Symbol:
    return Symbol(1, (name,))


def make(coefficient: int, names: Iterable[str]) -> Dim:
    ordered = tuple(sorted(names))
    return Symbol(coefficient, ordered) if ordered and coefficient else coefficient


def parts(dim: Dim) -> tuple[int, tuple[str, ...]]:
    return (dim, ()) if isinstance(dim, int) else (dim.coefficient, dim.names)


def product(dims: Iterable[Dim]) -> Dim:
    coefficient = 1
    names: list[str] = []
    for dim in dims:
        factor, more = parts(dim)
        coefficient *= factor
        names += more
    return make(coefficient, names)


def divide(whole: Dim, part: Dim) -> Dim | None:
    """whole / part where it is exact, else None."""
    (a, names), (b, divisor) = parts(whole), parts(part)
    left = Counter(names)
    left.subtract(divisor)
    if b == 0 or a % b or any(n < 0 for n in left.values()):
        return None
    return make(a // b, left.elements())


def evaluate(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The number, given the symbols' values. Raises KeyError for a symbol that is neither given nor a sum of given ones."""
    coefficient, names = parts(dim)
    return coefficient * math.prod(sizes[n] if n in sizes else computed(n, sizes.__getitem__) for n in names)


def computed(name: str, size: Callable[[str], int]) -> int:
    """The value of a symbol that is named by its sum, difference, product or quotient (past + 1). Raises KeyError for others."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return size(node.id)
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            return ARITHMETIC[type(node.op)](value(node.left), value(node.right))
        raise KeyError(name)

    try:
        tree = ast.parse(name.replace("·", "*"), mode="eval").body
        if not isinstance(tree, ast.BinOp):
            raise KeyError(name)
        return value(tree)
    except (SyntaxError, ZeroDivisionError):
        raise KeyError(name) from None
