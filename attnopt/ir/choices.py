"""Choices between two values, and operators on choices.

where(c, x, where(d, x, y))  ->  where(c | d, x, y)            where(a, 1, 0) * 3   ->   where(a, 3, 0)
where(c, x, where(~c, y, z)) ->  where(c, x, y)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.ir.expr import Apply, Const, Expr, children
from attnopt.ir.forms import is_choice

if TYPE_CHECKING:
    from attnopt.ir.simplify import Simplifier

TRUE, FALSE = Const(True), Const(False)
FOLDED = {"add", "sub", "mul", "min", "max", "lt", "le", "gt", "ge", "eq", "ne"}  # what is computed between literals


def choice(simplifier: Simplifier, c: Expr, a: Expr, b: Expr) -> Expr:
    if isinstance(c, Const):
        return a if c.value else b
    a, b = decided(simplifier, a, c, holds=True), decided(simplifier, b, c, holds=False)
    if a == b:
        return a
    if simplifier.kind(a) == simplifier.kind(b) == "bool":
        if a == TRUE:
            return simplifier.junction("or", c, b)
        if a == FALSE:
            return simplifier.junction("and", simplifier.negation(c), b)
        if b == TRUE:
            return simplifier.junction("or", simplifier.negation(c), a)
        if b == FALSE:
            return simplifier.junction("and", c, a)
    if is_choice(b) and a in b.args[1:]:  # where(c, x, where(d, x, y)), and with x and y exchanged
        x, y = b.args[1:]
        inner = b.args[0] if a == x else simplifier.negation(b.args[0])
        return choice(simplifier, simplifier.junction("or", c, inner), a, y if a == x else x)
    if is_choice(a) and b in a.args[1:]:
        x, y = a.args[1:]
        inner = a.args[0] if b == y else simplifier.negation(a.args[0])
        return choice(simplifier, simplifier.junction("and", c, inner), x if b == y else y, b)
    if isinstance(c, Apply) and c.op == "not":
        return choice(simplifier, c.args[0], b, a)
    return Apply("where", (c, a, b))


def pushed(simplifier: Simplifier, op: str, args: tuple[Expr, ...]) -> Expr | None:
    """An operator on choices between constants is a choice between results."""
    if not args or not any(is_choice(a) for a in args) or not all(is_choice(a) or isinstance(a, Const) for a in args):
        return None
    if any(is_choice(a) and not all(isinstance(x, Const) for x in a.args[1:]) for a in args) or len(args) > 2:
        return None
    if op not in FOLDED and op != "neg":
        return None
    if len(args) == 1 or isinstance(args[1], Const):
        c, *branches = children(args[0])
        results = [simplifier.build(op, x, *args[1:]) for x in branches]
    elif isinstance(args[0], Const):
        c, *branches = children(args[1])
        results = [simplifier.build(op, args[0], x) for x in branches]
    else:
        return combined(simplifier, op, args[0], args[1])
    return choice(simplifier, c, *results) if all(isinstance(r, Const) for r in results) else None


def combined(simplifier: Simplifier, op: str, a: Expr, b: Expr) -> Expr | None:
    """min(where(c, 0, m), where(d, 0, m)): two choices whose four results are two numbers."""
    (c, x, y), (d, u, v) = children(a), children(b)
    both, first, second, none = (simplifier.build(op, p, r) for p, r in ((x, u), (x, v), (y, u), (y, v)))
    if not all(isinstance(r, Const) for r in (both, first, second, none)):
        return None
    if first == second == none:
        return choice(simplifier, simplifier.junction("and", c, d), both, none)
    if both == first == second:
        return choice(simplifier, simplifier.junction("or", c, d), both, none)
    return None


def decided(simplifier: Simplifier, branch: Expr, c: Expr, *, holds: bool) -> Expr:
    """A branch of a choice, where its own choice is by the same condition: c is known to hold there, or not to."""
    if not is_choice(branch):
        return branch
    inner, x, y = branch.args
    if inner == c:
        return x if holds else y
    if inner == simplifier.negation(c):
        return y if holds else x
    return branch
