"""Print index expressions in a kernel's language: one walk over the tree, with what a language spells its own way as methods.

    causal & k % 2 == 0   ->   Triton (k <= q) & (k % 2 == 0)          TVMScript k <= q and k % 2 == 0

Numbers differ from Python's where a language says so; truth values become int32 before arithmetic; reals are float32.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from attnopt.codegen.buckets import is_bucket
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Apply, Const, Expr, Index, Load, Size, Term, children, expand_term, substitute, walk
from attnopt.ir.simplify import Simplifier
from attnopt.ir.site import Refusal
from attnopt.runtime.flex_source import INFIX, is_number

INEXACT = {"exp", "log", "tanh", "sqrt", "sin", "cos", "sigmoid", "pow", "div"}
SIZES = {"q": "q_len", "k": "kv_len"}


@dataclass(frozen=True)
class Binding:
    """How tightly the operators of a language bind, loosest first."""

    comparison: int
    disjunction: int
    conjunction: int
    negation: int
    sum: int = 3
    product: int = 4
    unary: int = 5
    atom: int = 6

    def of(self, op: str) -> int:
        return {
            "or": self.disjunction, "and": self.conjunction, "not": self.negation, "add": self.sum, "sub": self.sum,
            "mul": self.product, "div": self.product, "floordiv": self.product, "mod": self.product,
        }.get(op, self.comparison)  # fmt: skip


@dataclass(frozen=True)
class ExpressionPrinter:
    """dtypes: of the operands, by name. from_zero: queries are counted from 0, so that no position is negative.

    held: loads and buckets that have a name already.
    """

    dtypes: Mapping[str, str] = field(default_factory=dict)
    from_zero: bool = True
    held: Mapping[Expr, str] = field(default_factory=dict)

    language: ClassVar[str]
    machines: ClassVar[str]  # whose functions are rounded in their own way
    binding: ClassVar[Binding]
    calls: ClassVar[Mapping[str, str]]
    infix: ClassVar[Mapping[str, str]] = INFIX
    choice: ClassVar[str]

    # What a language spells its own way: each subclass has all of these.

    def cast(self, text: str, dtype: str) -> str:
        raise NotImplementedError

    def load(self, expr: Load) -> str:
        raise NotImplementedError

    def literal(self, value: bool | int | float) -> str:
        raise NotImplementedError

    def floored(self, op: str, args: tuple[Expr, ...]) -> str | None:
        """`//` or `%` as Python has it, as a call; None where the language's own sign will do."""
        raise NotImplementedError

    def power(self, exponent: Expr, base: float) -> str:
        """2^(base * exponent)."""
        raise NotImplementedError

    # What all share.

    @property
    def kinds(self) -> Simplifier:
        return Simplifier(self.dtypes)

    def kind(self, expr: Expr) -> str:
        return self.kinds.kind(expr)

    def refusal(self, expr: Expr | None) -> Refusal | None:
        """None where the expression can be printed and means in a kernel what `evaluate` says."""
        for part in () if expr is None else printed_parts(expr):
            if isinstance(part, Size) and part.name not in SIZES:
                return Refusal(f"the length '{part.name}' is not known to a kernel", expr)
            if isinstance(part, Load) and part.operand not in self.dtypes:
                return Refusal(f"the type of '{part.operand}' is not known", expr)
            if isinstance(part, Apply):
                if part.op in ("floordiv", "mod") and self.kind(part) == "float" and not is_number(part):
                    return Refusal(f"'{part.op}' of reals is not printed for {self.language}", expr)
                if part.op == "pow" and not is_number(part) and not positive_constant(part.args[0]):
                    return Refusal("a power is printed only of a positive constant", expr)
                if part.op in ("int", "floor") and not is_number(part) and inexact(part.args[0]):
                    # log(8) / log(2) may be 2.9999998 on one machine and 3 on another.
                    return Refusal(f"'{part.op}' of a function that {self.machines} round in their own way", expr)
        return None

    def text(self, expr: Expr, power: int = 0) -> str:
        """The expression, in parentheses where something that binds as tightly as `power` stands around it."""
        if expr in self.held:
            return self.held[expr]
        if isinstance(expr, Term):
            return self.text(expand_term(expr), power)
        if isinstance(expr, Index):
            return expr.name
        if isinstance(expr, Size):
            return SIZES.get(expr.name, expr.name)
        if isinstance(expr, Load):
            return self.load(expr)
        if is_number(expr):
            return self.literal(evaluate(expr, Grid(1, 1, 1, 1)).item())
        assert isinstance(expr, Apply)
        written, own = self.apply(expr)
        return f"({written})" if own < power else written

    def apply(self, expr: Apply) -> tuple[str, int]:
        """The text and how tightly its outermost operator binds."""
        op, args, atom = expr.op, expr.args, self.binding.atom
        power = self.binding.of(op)
        if op in ("and", "or", "not"):
            parts = [self.truth(a, power + (i > 0)) for i, a in enumerate(args)]
            return (f"{self.infix['not']}{parts[0]}" if op == "not" else f"{parts[0]} {self.infix[op]} {parts[1]}"), power
        if op == "where":
            branches = [self.number(a) if self.kind(expr) != "bool" else self.text(a) for a in args[1:]]
            return f"{self.choice}({self.truth(args[0])}, {', '.join(branches)})", atom
        if op in ("floordiv", "mod") and (call := self.floored(op, args)) is not None:
            return call, atom
        if op in ("float", "float32", "int", "floor", "pow"):
            return self.converted(op, args), atom
        if op == "neg":
            return f"-{self.number(args[0], self.binding.unary)}", self.binding.unary
        if op in self.calls:
            real = op not in ("abs", "min", "max")
            return f"{self.calls[op]}({', '.join(self.real(a) if real else self.number(a) for a in args)})", atom
        left, right = ((power + 1,) * 2) if power == self.binding.comparison else (power, power + 1)
        parts = [self.number(args[0], left), self.number(args[1], right)]
        if op == "div" and all(self.kind(a) != "float" for a in args):
            parts[0] = self.real(args[0])
        return f"{parts[0]} {self.infix[op]} {parts[1]}", power

    def converted(self, op: str, args: tuple[Expr, ...]) -> str:
        if op == "pow":
            return self.power(args[1], float(evaluate(args[0], Grid(1, 1, 1, 1)).double().log2()))
        if op == "int":
            return self.cast(self.text(args[0]), "int32")
        if op == "floor":
            return f"{self.calls['floor']}({self.text(args[0])})" if self.kind(args[0]) == "float" else self.number(args[0])
        return self.real(args[0])

    def truth(self, expr: Expr, power: int = 0) -> str:
        """As a truth value: numbers are true where they are not zero."""
        if self.kind(expr) == "bool":
            return self.text(expr, power)
        text = f"{self.text(expr, self.binding.comparison + 1)} != 0"
        return f"({text})" if power > self.binding.comparison else text

    def number(self, expr: Expr, power: int = 0) -> str:
        """As something to calculate with."""
        plain = self.kind(expr) != "bool" or is_number(expr)
        return self.text(expr, power) if plain else self.cast(self.text(expr), "int32")

    def real(self, expr: Expr, power: int = 0) -> str:
        if self.kind(expr) == "float":
            return self.text(expr, power)
        return repr(float(evaluate(expr, Grid(1, 1, 1, 1)))) if is_number(expr) else self.cast(self.text(expr), "float32")

    def never_negative(self, args: Iterable[Expr]) -> bool:
        """Proved: positions of rows and keys, lengths and what is made of them without a subtraction."""
        q = Index("row" if self.from_zero else "q")  # a row is never negative, a position with an offset may be
        return all(self.kinds.at_least_zero(substitute(a, {"q": q, "q_first": q, "q_last": q})) for a in args)


def printed_parts(expr: Expr) -> Iterator[Expr]:
    """Every sub-expression; named terms are entered, but not those that are printed as a whole."""
    yield expr
    if not is_bucket(expr):
        for child in (expand_term(expr),) if isinstance(expr, Term) else children(expr):
            yield from printed_parts(child)


def positive_constant(expr: Expr) -> bool:
    return is_number(expr) and float(evaluate(expr, Grid(1, 1, 1, 1))) > 0


def inexact(expr: Expr) -> bool:
    return any(isinstance(e, Apply) and e.op in INEXACT and not is_number(e) for e in walk(expr))


def plain_name(operand: str, reserved: frozenset[str]) -> str:
    """The name of a parameter that holds an operand, which no other parameter has."""
    name = re.sub(r"\W", "_", operand)
    return f"{name}_operand" if name in reserved else name


def strides(loads: Iterable[Load]) -> dict[str, tuple[int, ...]]:
    """For each operand the dimensions in which some load moves."""
    found: dict[str, set[int]] = {}
    for load in loads:
        found.setdefault(load.operand, set()).update(at for at, index in enumerate(load.indices) if index != Const(0))
    return {name: tuple(sorted(dims)) for name, dims in found.items()}


@functools.cache
def loads_of(expr: Expr | None) -> tuple[Load, ...]:
    return () if expr is None else tuple(dict.fromkeys(e for e in walk(expr) if isinstance(e, Load)))
