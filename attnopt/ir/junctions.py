"""Parts of `a & b` and `a | b` that say something of each other.

k < 5 & k < 3   ->   k < 3            k < q | k == q   ->   k <= q
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.ir.expr import Apply, Expr
from attnopt.ir.linear import Linear, at_most

if TYPE_CHECKING:
    from attnopt.ir.simplify import Simplifier


def widened(simplifier: Simplifier, strict: Expr, equal: Expr) -> tuple[Expr, Expr, Expr] | None:
    """a < b | a == b  is  a <= b: the two parts and what they are together."""
    bound = bounded(simplifier, strict)
    if bound is None or not isinstance(equal, Apply) or equal.op != "eq":
        return None
    a, b = simplifier.sum(equal.args[0]), simplifier.sum(equal.args[1])
    if a is None or b is None:
        return None
    edge = bound - Linear(constant=1)
    return (strict, equal, simplifier.inequality(edge)) if edge in (a - b, b - a) else None


def implies(simplifier: Simplifier, op: str, stronger: Expr, part: Expr) -> bool:
    """Whether `part` adds nothing beside `stronger`: a weaker bound of a conjunction, a stronger one of a disjunction."""
    a, b = bounded(simplifier, stronger), bounded(simplifier, part)
    if a is None or b is None or a.terms != b.terms:
        return False
    return a.constant > b.constant if op == "and" else a.constant < b.constant


def bounded(simplifier: Simplifier, expr: Expr) -> Linear | None:
    """L of a condition L <= 0 on whole numbers."""
    if not isinstance(expr, Apply) or expr.op not in ("le", "lt", "ge", "gt"):
        return None
    a, b = simplifier.sum(expr.args[0]), simplifier.sum(expr.args[1])
    return None if a is None or b is None else at_most(expr.op, a, b)
