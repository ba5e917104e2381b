"""Read expressions and spec lines: one tokeniser, one operator-precedence parser.

    "causal & (window(4096) | global(64))"  ->  Apply("and", (Term("causal"), Apply("or", (…))))

`&` binds tighter than `|`, comparisons tighter than `&`, arithmetic tighter than comparisons. Source of the method:
Pratt, "Top down operator precedence". Every error names the position and what was expected there.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, TypeVar

from attnopt.errors import SpecSyntaxError
from attnopt.ir.expr import (
    COMPARISON_POWER,
    INDICES,
    NAME,
    OPERATORS,
    TERMS,
    UNARY_POWER,
    Apply,
    Const,
    Expr,
    Index,
    Load,
    Scalar,
    Size,
    Term,
)

Parsed = TypeVar("Parsed")

TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)"
    rf"|(?P<word>{NAME.pattern})"
    r"|(?P<symbol>//|<=|>=|==|!=|[-+*/%<>&|~(),=]))"
)
INFIX = {o.symbol: (name, o.power) for name, o in OPERATORS.items() if o.arity == 2 and o.symbol}
PREFIX = {o.symbol: name for name, o in OPERATORS.items() if o.arity == 1 and o.symbol}
CALLS = {name: o.arity for name, o in OPERATORS.items() if not o.symbol}
WORDS: dict[str, Expr] = {
    **{name: Index(name) for name in INDICES},
    "true": Const(True),
    "false": Const(False),
    "inf": Const(math.inf),
    "nan": Const(math.nan),
}


@dataclass(frozen=True)
class Token:
    kind: str  # "number", "word", "symbol" or "end"
    text: str
    at: int


def tokenize(text: str) -> list[Token]:
    tokens, at = [], 0
    end = len(text.rstrip())
    while at < end:
        match = TOKEN.match(text, at)
        if match is None:
            raise SpecSyntaxError(text, len(text) - len(text[at:].lstrip()), "a number, a word or an operator")
        kind = str(match.lastgroup)
        tokens.append(Token(kind, match.group(kind), match.start(kind)))
        at = match.end()
    return [*tokens, Token("end", "", end)]


@dataclass
class Parser:
    """A cursor over the tokens of one line."""

    known: ClassVar[tuple[str, ...]] = (*WORDS, "size", "load", *TERMS, *CALLS)

    text: str
    parameters: dict[str, Expr] = field(default_factory=dict)
    tokens: list[Token] = field(init=False)
    at: int = 0

    def __post_init__(self) -> None:
        self.tokens = tokenize(self.text)

    @property
    def token(self) -> Token:
        return self.tokens[self.at]

    def peek(self, symbol: str) -> bool:
        return self.token.kind == "symbol" and self.token.text == symbol

    def take(self) -> Token:
        token = self.token
        self.at += token.kind != "end"
        return token

    def accept(self, symbol: str) -> bool:
        found = self.peek(symbol)
        self.at += found
        return found

    def expect(self, symbol: str) -> None:
        if not self.accept(symbol):
            raise self.error(f"'{symbol}'")

    def error(self, expected: str, token: Token | None = None) -> SpecSyntaxError:
        return SpecSyntaxError(self.text, (token or self.token).at, expected)

    def word(self, what: str) -> str:
        if self.token.kind != "word":
            raise self.error(what)
        return self.take().text

    def number(self) -> Scalar:
        """A literal with an optional sign, or true, false, inf, nan."""
        negative = self.accept("-")
        token = self.take()
        value: Scalar
        if token.kind == "number":
            value = int(token.text) if token.text.isdigit() else float(token.text)
        elif token.kind == "word" and isinstance(literal := WORDS.get(token.text), Const):
            value = literal.value
        else:
            raise self.error("a number", token)
        return -value if negative else value

    def arguments(self, parse_one: Callable[[], Parsed]) -> list[Parsed]:
        """`( one, one, … )`, at least one."""
        self.expect("(")
        found = [parse_one()]
        while self.accept(","):
            found.append(parse_one())
        self.expect(")")
        return found

    def expression(self, power: int = 0) -> Expr:
        left = self.prefix()
        while self.token.kind == "symbol" and self.token.text in INFIX:
            name, binding = INFIX[self.token.text]
            if binding < power:
                break
            self.take()
            left = Apply(name, (left, self.expression(binding + 1)))
            if binding == COMPARISON_POWER and self.token.text in INFIX and INFIX[self.token.text][1] == binding:
                raise self.error("'&' or '|': comparisons do not chain")
        return left

    def prefix(self) -> Expr:
        token = self.token
        if token.kind == "number":
            return Const(self.number())
        if self.peek("-") and self.is_literal(self.tokens[self.at + 1]):
            return Const(self.number())
        if token.kind == "symbol" and token.text in PREFIX:
            self.take()
            return Apply(PREFIX[token.text], (self.expression(UNARY_POWER),))
        if self.accept("("):
            inner = self.expression()
            self.expect(")")
            return inner
        if token.kind == "word":
            return self.named()
        raise self.error("an expression")

    @staticmethod
    def is_literal(token: Token) -> bool:
        return token.kind == "number" or (token.kind == "word" and token.text in ("inf", "nan"))

    def named(self) -> Expr:
        token = self.take()
        name = token.text
        if name in self.parameters:
            return self.parameters[name]
        if name in WORDS:
            return WORDS[name]
        if name == "size":
            self.expect("(")
            size = Size(self.word("the name of a length"))
            self.expect(")")
            return size
        if name == "load":
            self.expect("(")
            operand = self.word("the name of an operand")
            where = []
            while self.accept(","):
                where.append(self.expression())
            self.expect(")")
            return Load(operand, tuple(where))
        if name in TERMS:
            return self.term(token)
        if name in CALLS:
            arguments = tuple(self.arguments(self.expression))
            if len(arguments) != CALLS[name]:
                raise self.error(f"{CALLS[name]} arguments of {name}", token)
            return Apply(name, arguments)
        near = difflib.get_close_matches(name, self.known, n=1)
        raise self.error(f"a known word (did you mean '{near[0]}'?)" if near else f"one of {', '.join(self.known)}", token)

    def term(self, token: Token) -> Term | Expr:
        parameters = TERMS[token.text][0]
        if not parameters:
            return Term(token.text)

        def argument() -> Scalar:
            value = self.expression()
            if not isinstance(value, Const):
                raise self.error(f"a number for {token.text}", token)
            return value.value

        arguments = tuple(self.arguments(argument))
        if len(arguments) != len(parameters):
            raise self.error(f"{len(parameters)} argument(s) of {token.text}", token)
        return Term(token.text, arguments)

    def end(self) -> None:
        if self.token.kind != "end":
            raise self.error("the end of the line")


def parse_expr(text: str) -> Expr:
    """The expression a line spells. Raises SpecSyntaxError with the position and what was expected."""
    parser = Parser(text)
    result = parser.expression()
    parser.end()
    return result


@lru_cache(maxsize=1024)
def _parse_cached(text: str, parameters: tuple[tuple[str, Expr], ...]) -> Expr:
    parser = Parser(text, dict(parameters))
    result = parser.expression()
    parser.end()
    return result


def parse_with_parameters(text: str, parameters: dict[str, Expr]) -> Expr:
    """Parse with some words standing for given expressions: how named terms get their meaning."""
    return _parse_cached(text, tuple(parameters.items()))
