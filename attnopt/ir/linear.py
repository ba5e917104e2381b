"""Whole-number expressions as sums, so that comparisons of positions have one form.

    (q - 4096) < k     ->    {q: 1, k: -1} - 4095 <= 0        2 * (k + 1) - k     ->    {k: 1} + 2

An atom is whatever is not a sum itself: an index, a length, a load, a quotient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from attnopt.ir.dims import Dim, terms_of
from attnopt.ir.expr import Apply, Const, Expr, Index, Size, apply, render

ORDER = {"k": 0, "q": 1, "row": 2, "h": 3, "b": 4}


@dataclass(frozen=True)
class Linear:
    """sum of coefficient * atom, plus a constant; atoms in printing order, no coefficient is zero."""

    terms: tuple[tuple[Expr, int], ...] = ()
    constant: int = 0

    def __add__(self, other: Linear) -> Linear:
        return collected([*self.terms, *other.terms], self.constant + other.constant)

    def __mul__(self, factor: int) -> Linear:
        return collected([(atom, c * factor) for atom, c in self.terms], self.constant * factor)

    def __sub__(self, other: Linear) -> Linear:
        return self + other * -1

    @property
    def coefficients(self) -> Mapping[Expr, int]:
        return dict(self.terms)

    @property
    def number(self) -> int | None:
        """The value, where nothing but the constant is left."""
        return None if self.terms else self.constant

    def expr(self) -> Expr:
        """As an expression, positive terms first: k - q + 3."""
        result: Expr | None = None
        for atom, c in sorted(self.terms, key=lambda t: t[1] < 0):
            if result is None:
                result = atom if c == 1 else apply("mul", atom, c)
            else:
                part = atom if abs(c) == 1 else apply("mul", atom, abs(c))
                result = apply("add" if c > 0 else "sub", result, part)
        if result is None:
            return Const(self.constant)
        if self.constant:
            result = apply("add" if self.constant > 0 else "sub", result, abs(self.constant))
        return result


def collected(terms: Iterable[tuple[Expr, int]], constant: int) -> Linear:
    sums: dict[Expr, int] = {}
    for atom, c in terms:
        sums[atom] = sums.get(atom, 0) + c
    kept = [(atom, c) for atom, c in sums.items() if c]
    return Linear(tuple(sorted(kept, key=lambda t: rank(t[0]))), constant)


def rank(atom: Expr) -> tuple[int, str]:
    return (ORDER.get(atom.name, 5) if isinstance(atom, Index) else 5 if isinstance(atom, Size) else 6, render(atom))


def linear(expr: Expr, whole: Callable[[Expr], bool]) -> Linear | None:
    """The sum that a whole-number expression is; None where it is not whole."""
    if isinstance(expr, Const):
        return Linear(constant=expr.value) if isinstance(expr.value, int) and not isinstance(expr.value, bool) else None
    if isinstance(expr, Apply) and expr.op in ("add", "sub", "mul", "neg"):
        parts = [linear(a, whole) for a in expr.args]
        if any(p is None for p in parts):
            return None
        first, *rest = (p for p in parts if p is not None)
        if expr.op == "neg":
            return first * -1
        if expr.op in ("add", "sub"):
            return first + rest[0] if expr.op == "add" else first - rest[0]
        for factor, other in ((first, rest[0]), (rest[0], first)):
            if factor.number is not None:
                return other * factor.number
        return Linear(((expr, 1),))
    return Linear(((expr, 1),)) if whole(expr) else None


def length(dim: Dim) -> Linear | None:
    """A dimension of a graph as a sum of lengths: past + sequence; None where it is no such sum."""
    sums = terms_of(dim)
    if sums is None:
        return None
    terms: list[tuple[Expr, int]] = []
    constant = 0
    for names, c in sums.items():
        if not names:
            constant += c
        else:
            atom: Expr = Size(names[0])
            for name in names[1:]:
                atom = apply("mul", atom, Size(name))
            terms.append((atom, c))
    return collected(terms, constant)


def at_most(op: str, a: Linear, b: Linear) -> Linear:
    """L such that `a op b` is L <= 0."""
    one = Linear(constant=1)
    return {"le": a - b, "lt": a - b + one, "ge": b - a, "gt": b - a + one}[op]


def sides(value: Linear) -> tuple[Linear, Linear]:
    """value <= 0 as left <= right, each with positive terms only where it can; the constant stands on the right."""
    left = Linear(tuple(t for t in value.terms if t[1] > 0))
    right = Linear(tuple((a, -c) for a, c in value.terms if c < 0), -value.constant)
    return left, right


def absolute(value: Linear) -> tuple[Expr, Linear] | None:
    """(x, rest) where value is |x| + rest."""
    for atom, c in value.terms:
        if c == 1 and isinstance(atom, Apply) and atom.op == "abs":
            return atom.args[0], value - Linear(((atom, 1),))
    return None


def divided(whole: Linear, by: Linear) -> tuple[Linear, Linear | None]:
    """(quotient, rest) of a sum whose terms are multiples of `by`, or are left over."""
    number = by.number
    if number is not None and number > 0:
        quotient = [(a, c // number) for a, c in whole.terms if c % number == 0]
        rest = [(a, c) for a, c in whole.terms if c % number]
        return Linear(tuple(quotient), whole.constant // number), Linear(tuple(rest), whole.constant % number)
    if len(by.terms) == 1 and by.constant == 0 and by.terms[0][1] == 1:
        size = by.terms[0][0]
        quotients: list[tuple[Expr, int]] = []
        kept: list[tuple[Expr, int]] = []
        for atom, c in whole.terms:
            if isinstance(atom, Apply) and atom.op == "mul" and size in atom.args:
                quotients.append((atom.args[1] if atom.args[0] == size else atom.args[0], c))
            else:
                kept.append((atom, c))
        return Linear(tuple(quotients)), Linear(tuple(kept), whole.constant)
    return Linear(), None
