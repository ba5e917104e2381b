"""Sizes of tensor dimensions: an int, or a product of symbols such as 12*batch.

    product([Dim(1, ("batch",)), 12])  ->  12*batch         divide(12*batch, batch)  ->  12

Products are all that layouts need; a sum (past + 1) is one opaque symbol named by its text, which `terms_of` takes apart.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Union

ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
}  # fmt: skip


NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


@dataclass(frozen=True)
class Symbol:
    """coefficient * product of names (sorted, repeated for powers)."""

    coefficient: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        alone = self.coefficient == 1 and len(self.names) == 1
        text = "*".join(n if alone or NAME.fullmatch(n) else f"({n})" for n in self.names)
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


def solved(dim: Dim, size: int) -> tuple[str, int] | None:
    """The symbol whose value a size tells, and the value: 6*chunks of 24 is 4 chunks; None where the dimension holds no one symbol."""
    coefficient, names = parts(dim)
    if len(names) != 1 or size % coefficient:
        return None
    return names[0], size // coefficient


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


def terms_of(dim: Dim) -> dict[tuple[str, ...], int] | None:
    """A size as a sum of products: {("past",): 1, ("sequence",): 1, (): 3} for past + sequence + 3; None for other text."""
    coefficient, names = parts(dim)
    total: dict[tuple[str, ...], int] = {(): coefficient}
    for name in names:
        if name.isidentifier() or NAME.fullmatch(name):
            factor: dict[tuple[str, ...], int] | None = {(name,): 1}
        else:
            factor = sum_of(name)
        if factor is None:
            return None
        total = multiplied(total, factor)
    return {key: c for key, c in total.items() if c}


def sum_of(text: str) -> dict[tuple[str, ...], int] | None:
    """The sum that the text of a symbol spells, products included; None where it is none."""

    def value(node: ast.expr) -> dict[tuple[str, ...], int]:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return {(): node.value}
        if isinstance(node, ast.Name):
            return {(node.id,): 1}
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return {key: -c for key, c in value(node.operand).items()}
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Mult):
                return multiplied(left, right)
            sign = {ast.Add: 1, ast.Sub: -1}.get(type(node.op))
            if sign is not None:
                return {key: left.get(key, 0) + sign * right.get(key, 0) for key in {**left, **right}}
        raise ValueError(text)

    try:
        return value(ast.parse(text.replace("·", "*"), mode="eval").body)
    except (SyntaxError, ValueError):
        return None


def multiplied(a: dict[tuple[str, ...], int], b: dict[tuple[str, ...], int]) -> dict[tuple[str, ...], int]:
    result: dict[tuple[str, ...], int] = {}
    for left, x in a.items():
        for right, y in b.items():
            key = tuple(sorted((*left, *right)))
            result[key] = result.get(key, 0) + x * y
    return result
