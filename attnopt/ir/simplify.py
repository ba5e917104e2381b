"""Build index expressions in their simplest form: every operator folds what is known about its arguments.

    where(k > q - 8, 0.0, -inf) != 0.0     ->    k - q <= -8          float32(a & true) * 2.0    ->    where(a, 2.0, 0.0)
    (b * 12 + h) // 12  with  0 <= h < 12  ->    b                    k < size(k)                ->    true

Rules hold for every value of the indices inside their bounds and every length, zero included. Floating-point sums and products
are folded between literals only, and never reordered.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from attnopt.ir.buckets import above_once_large
from attnopt.ir.expr import Apply, Const, Expr, Index, Load, Size, Term, children, expand_term
from attnopt.ir.forms import is_choice, is_infinite, is_number, split
from attnopt.ir.junctions import implies, widened
from attnopt.ir.linear import Linear, absolute, at_most, divided, linear, sides

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip
FOLDED: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "min": min, "max": max, **COMPARISONS,
}  # fmt: skip
OPPOSITE = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}
WHOLE = {"add", "sub", "mul", "neg", "floordiv", "mod", "min", "max", "abs"}
TRUE, FALSE = Const(True), Const(False)
LARGEST = 3.4028235e38  # of float32: what overflows there is not folded


@dataclass
class Simplifier:
    """`dtypes` of the operands that are loaded; `limits` the largest value of each index, as a sum of lengths."""

    dtypes: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, Linear] = field(default_factory=dict)

    # What is known of an expression.

    def kind(self, expr: Expr) -> str:
        """ "bool", "int" or "float"."""
        if isinstance(expr, (Index, Size)):
            return "int"
        if isinstance(expr, Const):
            return "bool" if isinstance(expr.value, bool) else "int" if isinstance(expr.value, int) else "float"
        if isinstance(expr, Load):
            dtype = self.dtypes.get(expr.operand, "float32")
            return "bool" if dtype == "bool" else "int" if "int" in dtype else "float"
        if isinstance(expr, Term):
            return self.kind(expand_term(expr))
        if expr.op in COMPARISONS or expr.op in ("and", "or", "not"):
            return "bool"
        if expr.op in ("int", "where"):
            kinds = {self.kind(a) for a in expr.args[1:]}
            return "int" if expr.op == "int" else next(k for k in ("float", "int", "bool") if k in kinds)
        if expr.op in WHOLE and all(self.kind(a) != "float" for a in expr.args):
            return "int"
        return "float"

    def whole(self, expr: Expr) -> bool:
        return self.kind(expr) == "int"

    def sum(self, expr: Expr) -> Linear | None:
        return linear(expr, self.whole)

    def largest(self, value: Linear) -> Linear | None:
        """An upper bound in lengths alone; None where there is none."""
        total = Linear(constant=value.constant)
        for atom, c in value.terms:
            bound = self.bound(atom, upper=c > 0)
            if bound is None:
                return None
            total += bound * c
        return total

    def bound(self, atom: Expr, *, upper: bool) -> Linear | None:
        if isinstance(atom, Size):
            return Linear(((atom, 1),))
        if isinstance(atom, Index):
            return self.limits.get(atom.name) if upper else Linear() if atom.name != "q" else None
        if isinstance(atom, Apply) and atom.op == "mod" and isinstance(atom.args[1], Const):
            return Linear(constant=int(atom.args[1].value) - 1) if upper else Linear()
        if isinstance(atom, Apply) and atom.op == "floordiv" and not upper:
            return Linear() if self.at_least_zero(atom.args[0]) and self.at_least_zero(atom.args[1]) else None
        if isinstance(atom, Apply) and atom.op == "mul":
            if all(isinstance(a, Size) for a in atom.args):
                return Linear(((atom, 1),))
            return Linear() if not upper and all(self.at_least_zero(a) for a in atom.args) else None
        if is_choice(atom):
            return self.bound_of_choice(*atom.args, upper=upper)
        if isinstance(atom, Apply) and atom.op == "abs" and not upper:
            return Linear()
        if isinstance(atom, Apply) and atom.op in ("min", "max"):
            parts = [self.sum(a) for a in atom.args]
            bounds = [None if p is None else self.largest(p) if upper else negated(self.largest(p * -1)) for p in parts]
            known = [b for b in bounds if b is not None and b.number is not None]
            if (atom.op == "min") == upper and known:
                return (min if upper else max)(known, key=lambda b: b.constant)
            return None if len(known) < 2 else (max if upper else min)(known, key=lambda b: b.constant)
        return None

    def bound_of_choice(self, c: Expr, a: Expr, b: Expr, *, upper: bool) -> Linear | None:
        """The bound of both branches, where it is a number."""
        found = [self.extent(x, upper=upper) for x in (a, b)]
        if not upper and found[0] is not None and found[1] is None and above_once_large(self, c, a, b):
            return Linear(constant=min(found[0], 0))
        if found[0] is None or found[1] is None:
            return None
        return Linear(constant=(max if upper else min)(found[0], found[1]))

    def extent(self, expr: Expr, *, upper: bool) -> int | None:
        """The largest or smallest value as a number, where there is one."""
        value = self.sum(expr)
        bound = None if value is None else self.largest(value if upper else value * -1)
        number = None if bound is None else bound.number
        return number if number is None or upper else -number

    def at_most_zero(self, value: Linear) -> bool:
        """Proved: never above zero, whatever the lengths. A length may be zero: that of a cache before the first step."""
        bound = self.largest(value)
        return bound is not None and all(c <= 0 for _, c in bound.terms) and bound.constant <= 0

    def at_least_zero(self, expr: Expr) -> bool:
        value = self.sum(expr)
        return value is not None and self.at_most_zero(value * -1)

    def below(self, expr: Expr, limit: Expr) -> bool:
        """Proved: expr < limit."""
        a, b = self.sum(expr), self.sum(limit)
        return a is not None and b is not None and self.at_most_zero(a - b + Linear(constant=1))

    # Construction.

    def again(self, expr: Expr) -> Expr:
        """The expression built anew, bottom up."""
        if isinstance(expr, Term):
            return expr
        if isinstance(expr, Load):
            return Load(expr.operand, tuple(self.again(i) for i in expr.indices))
        if isinstance(expr, Apply):
            return self.build(expr.op, *(self.again(a) for a in expr.args))
        return expr

    def build(self, op: str, *args: Expr) -> Expr:
        """`op(args…)`, simplified."""
        if op in ("and", "or"):
            return self.junction(op, args[0], args[1])
        if op == "not":
            return self.negation(args[0])
        if op == "where":
            return self.choice(args[0], args[1], args[2])
        if op in ("int", "float", "float32"):
            return self.conversion(op, args[0])
        if (pushed := self.pushed(op, args)) is not None:
            return pushed
        if op in COMPARISONS:
            return self.comparison(op, args[0], args[1])
        if op in ("floordiv", "mod"):
            return self.division(op, args[0], args[1])
        if op in ("add", "sub", "mul", "neg"):
            return self.arithmetic(op, args)
        if op in ("min", "max"):
            return self.extreme(op, args[0], args[1])
        if op == "abs" and self.at_least_zero(args[0]):
            return args[0]
        return Apply(op, args)

    def junction(self, op: str, a: Expr, b: Expr) -> Expr:
        neutral, absorbing = (TRUE, FALSE) if op == "and" else (FALSE, TRUE)
        for x, y in ((a, b), (b, a)):
            if x == neutral:
                return y
            if x == absorbing:
                return absorbing
        parts = list(dict.fromkeys((*split(op, a), *split(op, b))))
        if op == "or" and (joined := next((j for x in parts for y in parts if (j := widened(self, x, y)) is not None), None)):
            rest = [p for p in parts if p not in joined[:2]]
            result = joined[2]
            for part in rest:
                result = self.junction("or", result, part)
            return result
        if any(self.negation(p) in parts for p in parts):
            return absorbing
        parts = [p for p in parts if not any(p is not other and implies(self, op, other, p) for other in parts)]
        result = parts[0]
        for part in parts[1:]:
            result = Apply(op, (result, part))
        return result

    def negation(self, a: Expr) -> Expr:
        if isinstance(a, Const):
            return Const(not a.value)
        if isinstance(a, Apply):
            if a.op == "not":
                return a.args[0]
            exact = self.kind(a.args[0]) != "float" and self.kind(a.args[-1]) != "float"  # NaN is neither above nor below
            if a.op in OPPOSITE and (exact or a.op in ("eq", "ne")):
                return self.comparison(OPPOSITE[a.op], *a.args)
            if a.op in ("and", "or"):
                return self.junction("or" if a.op == "and" else "and", self.negation(a.args[0]), self.negation(a.args[1]))
        return Apply("not", (a,))

    def choice(self, c: Expr, a: Expr, b: Expr) -> Expr:
        if isinstance(c, Const):
            return a if c.value else b
        if a == b:
            return a
        if self.kind(a) == self.kind(b) == "bool":
            if a == TRUE:
                return self.junction("or", c, b)
            if a == FALSE:
                return self.junction("and", self.negation(c), b)
            if b == TRUE:
                return self.junction("or", self.negation(c), a)
            if b == FALSE:
                return self.junction("and", c, a)
        if is_choice(b) and a in b.args[1:]:  # where(c, x, where(d, x, y)), and with x and y exchanged
            x, y = b.args[1:]
            inner = b.args[0] if a == x else self.negation(b.args[0])
            return self.choice(self.junction("or", c, inner), a, y if a == x else x)
        if is_choice(a) and b in a.args[1:]:
            x, y = a.args[1:]
            inner = a.args[0] if b == y else self.negation(a.args[0])
            return self.choice(self.junction("and", c, inner), x if b == y else y, b)
        if isinstance(c, Apply) and c.op == "not":
            return self.choice(c.args[0], b, a)
        return Apply("where", (c, a, b))

    def conversion(self, op: str, a: Expr) -> Expr:
        kind = self.kind(a)
        if isinstance(a, Const):
            return Const(int(a.value)) if op == "int" else Const(float(a.value))
        if kind == "bool":
            return self.choice(a, Const(1), Const(0)) if op == "int" else self.choice(a, Const(1.0), Const(0.0))
        if is_choice(a) and all(isinstance(x, Const) for x in a.args[1:]):
            return self.choice(a.args[0], self.conversion(op, a.args[1]), self.conversion(op, a.args[2]))
        if (op == "int" and kind == "int") or (isinstance(a, Apply) and a.op == op):
            return a
        return Apply(op, (a,))

    def pushed(self, op: str, args: tuple[Expr, ...]) -> Expr | None:
        """An operator on choices between constants is a choice between results."""
        if not args or not any(is_choice(a) for a in args) or not all(is_choice(a) or isinstance(a, Const) for a in args):
            return None
        if any(is_choice(a) and not all(isinstance(x, Const) for x in a.args[1:]) for a in args) or len(args) > 2:
            return None
        if op not in FOLDED and op != "neg":
            return None
        if len(args) == 1 or isinstance(args[1], Const):
            c, *branches = children(args[0])
            results = [self.build(op, x, *args[1:]) for x in branches]
        elif isinstance(args[0], Const):
            c, *branches = children(args[1])
            results = [self.build(op, args[0], x) for x in branches]
        else:
            return self.combined(op, args[0], args[1])
        return self.choice(c, *results) if all(isinstance(r, Const) for r in results) else None

    def combined(self, op: str, a: Expr, b: Expr) -> Expr | None:
        """min(where(c, 0, m), where(d, 0, m)): two choices whose four results are two numbers."""
        (c, x, y), (d, u, v) = children(a), children(b)
        both, first, second, none = (self.build(op, p, r) for p, r in ((x, u), (x, v), (y, u), (y, v)))
        if not all(isinstance(r, Const) for r in (both, first, second, none)):
            return None
        if first == second == none:
            return self.choice(self.junction("and", c, d), both, none)
        if both == first == second:
            return self.choice(self.junction("or", c, d), both, none)
        return None

    def comparison(self, op: str, a: Expr, b: Expr) -> Expr:
        if isinstance(a, Const) and isinstance(b, Const):
            return Const(bool(COMPARISONS[op](a.value, b.value)))
        for x, y in ((a, b), (b, a)):
            if op in ("eq", "ne") and self.kind(x) == "bool" and isinstance(y, Const):
                return x if bool(y.value) == (op == "eq") else self.negation(x)
        if op in ("eq", "ne") and self.kind(a) == self.kind(b) == "bool" and op == "ne" and a == b:
            return FALSE
        left, right = self.sum(a), self.sum(b)
        if left is None or right is None:
            return Apply(op, (a, b))
        if op in ("eq", "ne"):
            return self.equality(op, left - right)
        return self.inequality(at_most(op, left, right))

    def equality(self, op: str, value: Linear) -> Expr:
        if value.number is not None:
            return Const((value.number == 0) == (op == "eq"))
        if self.at_most_zero(value + Linear(constant=1)) or self.at_most_zero(value * -1 + Linear(constant=1)):
            return Const(op == "ne")
        left, right = sides(value)
        return Apply(op, (left.expr(), right.expr()))

    def inequality(self, value: Linear) -> Expr:
        """value <= 0 in the form that reads best."""
        if value.number is not None:
            return Const(value.number <= 0)
        if self.at_most_zero(value):
            return TRUE
        if self.at_most_zero(value * -1 + Linear(constant=1)):
            return FALSE
        distance = absolute(value)
        if distance is not None:  # |x| <= c is x <= c and -x <= c
            inside, rest = distance
            near = self.sum(inside)
            if near is not None:
                return self.junction("and", self.inequality(near + rest), self.inequality(near * -1 + rest))
        left, right = sides(value)
        if not left.terms:
            return Apply("ge", (right.expr(), left.expr()))
        return Apply("le", (left.expr(), right.expr()))

    def arithmetic(self, op: str, args: tuple[Expr, ...]) -> Expr:
        whole = self.sum(Apply(op, args))
        if whole is not None:
            return self.rejoined(whole).expr()
        if len(args) == 1:
            return Const(-args[0].value) if isinstance(args[0], Const) else Apply(op, args)  # type: ignore[operator]
        a, b = args
        if isinstance(a, Const) and isinstance(b, Const):
            folded = FOLDED[op](a.value, b.value) + 0.0  # no negative zero
            overflows = LARGEST < abs(folded) < math.inf or (math.isinf(folded) and not any(map(is_infinite, args)))
            return Apply(op, args) if overflows else Const(folded)
        if op in ("add", "sub") and is_number(b, 0) and self.kind(a) == "float":
            return a
        if op == "add" and is_number(a, 0) and self.kind(b) == "float":
            return b
        if op == "mul" and is_number(b, 1) and self.kind(a) == "float":
            return a
        if op == "mul" and is_number(a, 1) and self.kind(b) == "float":
            return b
        return Apply(op, args)

    def rejoined(self, value: Linear) -> Linear:
        """c * n * (x // n) + c * (x % n) is c * x."""
        known = value.coefficients
        for atom, c in value.terms:
            if isinstance(atom, Apply) and atom.op == "mod":
                x, n = atom.args
                part = self.sum(Apply("mul", (Apply("floordiv", (x, n)), n)))
                inner = self.sum(x)
                if (
                    part is not None
                    and inner is not None
                    and len(part.terms) == 1
                    and known.get(part.terms[0][0]) == c * part.terms[0][1]
                ):
                    return self.rejoined(value - part * c - Linear(((atom, c),)) + inner * c)
        return value

    def extreme(self, op: str, a: Expr, b: Expr) -> Expr:
        if isinstance(a, Const) and isinstance(b, Const):
            return Const(FOLDED[op](a.value, b.value))
        x, y = self.sum(a), self.sum(b)
        if x is not None and y is not None:
            if self.at_most_zero(x - y):
                return a if op == "min" else b
            if self.at_most_zero(y - x):
                return b if op == "min" else a
        return Apply(op, (a, b))

    def division(self, op: str, a: Expr, b: Expr) -> Expr:
        """(x * n + y) // n is x where 0 <= y < n, also for lengths as n."""
        whole, by = self.sum(a), self.sum(b)
        if whole is None or by is None or by.number == 0:
            return Apply(op, (a, b))
        if by.number == 1:
            return a if op == "floordiv" else Const(0)
        quotient, rest = divided(whole, by)
        if rest is not None and self.at_most_zero(rest * -1) and self.below(rest.expr(), b):
            return quotient.expr() if op == "floordiv" else rest.expr()
        if whole.number is not None and by.number is not None:
            return Const(whole.number // by.number if op == "floordiv" else whole.number % by.number)
        return Apply(op, (whole.expr(), by.expr()))


def negated(value: Linear | None) -> Linear | None:
    return None if value is None else value * -1
