"""Index expressions: what a mask or a bias computes at one (batch, head, query, key).

    causal & (window(4096) | global(64))        a mask: true where the query may see the key
    load(bias, h, q, k) + load(slopes, h) * (k - q)   a bias: what is added to the score

The indices are `b` (batch), `h` (query head), `q` (absolute query position), `k` (key position), and `row`, the row of the
query in its own tensor (q without the past). `load(x, i, …)` reads operand x; `size(q)`, `size(k)` are the lengths. Named
terms (`causal`, `window(w)`, …) are names for expressions and expand to them. An expression is a frozen value: it prints
as one line (`str`), and `parse_expr` of that line gives an equal value. Its meaning in tensors is `evaluate`. Other
languages (Triton, TIR, ONNX) are printers over the same tree.

Division and modulus floor, as in Python: -1 // 2 is -1 and -1 % 2 is 1. A load outside of its operand is an error, also
in the branch of a `where` that is not taken: clamp the index with min and max.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Union

Scalar = bool | int | float
Expr = Union["Index", "Const", "Size", "Load", "Apply", "Term"]

INDICES = ("b", "h", "q", "k", "row")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


@dataclass(frozen=True)
class Index:
    """One of the loop indices: b, h, q, k, row."""

    name: str

    def __str__(self) -> str:
        return render(self)


@dataclass(frozen=True)
class Const:
    """A literal. Literals are equal where they print equally: `true`, `1` and `1.0` differ, and `nan` equals itself."""

    value: Scalar

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Const) and render_number(self.value) == render_number(other.value)

    def __hash__(self) -> int:
        return hash(render_number(self.value))

    def __str__(self) -> str:
        return render(self)


@dataclass(frozen=True)
class Size:
    """A length known at run time: `size(q)`, `size(k)`, or the name of a symbol of the graph."""

    name: str

    def __post_init__(self) -> None:
        check_name(self.name)

    def __str__(self) -> str:
        return render(self)


@dataclass(frozen=True)
class Load:
    """One element of an operand tensor, read at the given indices."""

    operand: str
    indices: tuple[Expr, ...]

    def __post_init__(self) -> None:
        check_name(self.operand)

    def __str__(self) -> str:
        return render(self)


@dataclass(frozen=True)
class Apply:
    """An operator of `OPERATORS` on its arguments."""

    op: str
    args: tuple[Expr, ...]

    def __str__(self) -> str:
        return render(self)


@dataclass(frozen=True)
class Term:
    """A named expression of `TERMS`; `expand` gives what it stands for. Whole numbers among the arguments are ints."""

    name: str
    args: tuple[Scalar, ...] = ()

    def __post_init__(self) -> None:
        whole = tuple(int(a) if math.isfinite(a) and a == int(a) else a for a in self.args)
        object.__setattr__(self, "args", whole)

    def __str__(self) -> str:
        return render(self)


@dataclass(frozen=True)
class Operator:
    """How an operator reads and prints. Infix operators have a symbol and a binding power; others are calls."""

    arity: int
    symbol: str = ""
    power: int = 0


OPERATORS: dict[str, Operator] = {
    "or": Operator(2, "|", 1),
    "and": Operator(2, "&", 2),
    "lt": Operator(2, "<", 3),
    "le": Operator(2, "<=", 3),
    "gt": Operator(2, ">", 3),
    "ge": Operator(2, ">=", 3),
    "eq": Operator(2, "==", 3),
    "ne": Operator(2, "!=", 3),
    "add": Operator(2, "+", 4),
    "sub": Operator(2, "-", 4),
    "mul": Operator(2, "*", 5),
    "div": Operator(2, "/", 5),
    "floordiv": Operator(2, "//", 5),
    "mod": Operator(2, "%", 5),
    "neg": Operator(1, "-", 6),
    "not": Operator(1, "~", 6),
    **{name: Operator(1) for name in ("abs", "exp", "log", "tanh", "sqrt", "sin", "cos")},
    **{name: Operator(1) for name in ("floor", "int", "float", "float32", "sigmoid")},
    **{name: Operator(2) for name in ("min", "max", "pow")},
    "where": Operator(3),
}
COMPARISON_POWER, UNARY_POWER = 3, 6

# One dimension of a neighbourhood (Faster Neighborhood Attention): i and j are the positions of query and key along a dimension
# of the given length, `inner` positions apart. Windows shift inward at the borders, so that every query sees w keys.
_I, _J = "(q // inner % length)", "(k // inner % length)"
_LAST = f"((length - {_I} % dilation + dilation - 1) // dilation - 1)"  # last member of the query's dilation group
_LEAD = f"min({_I} // dilation // stride * stride + stride // 2, {_LAST})"
_CENTRE = f"min(max({_LEAD}, w // 2), {_LAST} - (w - 1) // 2)"
_CAUSAL_LEAD = f"min({_I} // dilation // stride * stride + stride - 1, {_LAST})"
_NEIGHBOURHOOD = ("w", "dilation", "stride", "length", "inner")

# Blocks by chance (BigBird): of the `rest` blocks of n keys beyond those up to `near` blocks away, and the first (and last) one, `count`
# are drawn: the rest is cut into as many parts, and one of each is taken. `rank` is the place of a key's block in the rest. The number
# that is drawn is a cube modulo a prime of (block, head, part, seed): all products stay below 2^31.
RANDOM_SEEDS = 46337
_CLOSE = "(min(q // n + near, (size(k) - 1) // n - 1) - max(q // n - near, 1) + 1)"


def _drawn(rank: str, rest: str) -> str:
    part = f"((({rank} + 1) * count - 1) // max({rest}, 1))"
    x = f"((q // n * 7919 + h * 5323 + {part} * 3571 + seed) % {RANDOM_SEEDS})"
    first, end = (f"({rest} * {of} // count)" for of in (part, f"({part} + 1)"))
    chosen = f"{first} + {x} * {x} % {RANDOM_SEEDS} * {x} % {RANDOM_SEEDS} % max({end} - {first}, 1)"
    return f"{rank} >= 0 & {rank} < {rest} & {rank} == {chosen}"


# name -> (parameters, meaning). The meaning is parsed on first use, so a term may use earlier terms.
TERMS: dict[str, tuple[tuple[str, ...], str]] = {
    "causal": ((), "k <= q"),
    "window": (("w",), "q - k < w"),
    "lookahead": (("w",), "k - q < w"),
    "global": (("n",), "k < n"),
    "last": (("n",), "k >= size(k) - n"),
    "global_query": (("n",), "q < n"),
    "last_query": (("n",), "q >= size(k) - n"),
    "chunk": (("n",), "q // n == k // n"),
    "near_blocks": (("n", "w"), "abs(q // n - k // n) <= w"),
    # The distance in blocks is a power of two (or not positive): exactly the divisors of 2^40.
    "power_blocks": (("n",), "1099511627776 % max(q // n - k // n, 1) == 0"),
    "dilated": (("n",), "(q - k) % n == 0"),
    "diagonal": ((), "q == k"),
    "neighborhood": (
        _NEIGHBOURHOOD,
        f"{_I} % dilation == {_J} % dilation"
        f" & {_J} // dilation - {_CENTRE} >= -(w // 2) & {_J} // dilation - {_CENTRE} <= (w - 1) // 2",
    ),
    "causal_neighborhood": (
        _NEIGHBOURHOOD,
        f"{_I} % dilation == {_J} % dilation & {_J} // dilation <= {_I} // dilation"
        f" & {_CAUSAL_LEAD} - {_J} // dilation >= 0 & {_CAUSAL_LEAD} - {_J} // dilation < w",
    ),
    "random_blocks": (
        ("n", "near", "count", "seed"),
        _drawn(f"(k // n - 1 - where(k // n > q // n, {_CLOSE}, 0))", f"((size(k) - 1) // n - 1 - {_CLOSE})")
        + " & abs(q // n - k // n) > near",
    ),
    "causal_random_blocks": (("n", "near", "count", "seed"), _drawn("(k // n - 1)", "(q // n - near - 1)")),
    # Buckets of distances: exact ones up to n, then logarithmic ones (T5); `ratio` is the logarithm of the largest distance over n.
    "bucket": (
        ("n", "ratio"),
        "where(abs(k - q) < n, abs(k - q), min(int(log(float32(abs(k - q)) / float(n)) / ratio * float(n)) + n, 2 * n - 1))"
        " + where(k > q, 2 * n, 0)",
    ),
    "causal_bucket": (
        ("n", "ratio"),
        "where(-min(k - q, 0) < n, -min(k - q, 0),"
        " min(int(log(float32(-min(k - q, 0)) / float(n)) / ratio * float(n)) + n, 2 * n - 1))",
    ),
    "padding": ((), "load(padding, b, k)"),
    "document": ((), "load(document, b, q) == load(document, b, k)"),
    "prefix": ((), "k < load(prefix, b)"),
    "alibi": ((), "load(slopes, h) * (k - q)"),
}


def check_name(name: str) -> None:
    """Raise ValueError for a name that does not read back as one word."""
    if not NAME.fullmatch(name):
        raise ValueError(f"'{name}' cannot name an operand or a length: letters, digits, '_' and '.' only")


def apply(op: str, *args: Expr | Scalar) -> Apply:
    """Build `op(args…)`; plain numbers become constants."""
    wrapped = tuple(Const(a) if isinstance(a, (bool, int, float)) else a for a in args)
    if len(wrapped) != OPERATORS[op].arity:
        raise ValueError(f"{op} takes {OPERATORS[op].arity} arguments, not {len(wrapped)}")
    return Apply(op, wrapped)


def conjunction(*parts: Expr | None) -> Expr | None:
    """`a & b & …` without the absent parts and without repeats; None when nothing is left."""
    result: Expr | None = None
    seen: list[Expr] = []
    for part in parts:
        if part is not None and part not in seen:
            seen.append(part)
            result = part if result is None else apply("and", result, part)
    return result


def conjuncts(expr: Expr | None) -> tuple[Expr, ...]:
    """The parts of `a & b & …`, left to right; empty for None."""
    if expr is None:
        return ()
    if isinstance(expr, Apply) and expr.op == "and":
        return conjuncts(expr.args[0]) + conjuncts(expr.args[1])
    return (expr,)


def disjuncts(expr: Expr) -> tuple[Expr, ...]:
    """The alternatives of `a | b | …`, left to right."""
    if isinstance(expr, Apply) and expr.op == "or":
        return disjuncts(expr.args[0]) + disjuncts(expr.args[1])
    return (expr,)


def children(expr: Expr) -> tuple[Expr, ...]:
    if isinstance(expr, Load):
        return expr.indices
    return expr.args if isinstance(expr, Apply) else ()


def walk(expr: Expr) -> Iterator[Expr]:
    """Every sub-expression, the expression itself first; named terms are entered."""
    yield expr
    for child in (expand_term(expr),) if isinstance(expr, Term) else children(expr):
        yield from walk(child)


def operands(expr: Expr | None) -> tuple[str, ...]:
    """Names of the operands that the expression loads, in order of first use."""
    names = (e.operand for e in walk(expr) if isinstance(e, Load)) if expr is not None else ()
    return tuple(dict.fromkeys(names))


def indices(expr: Expr | None) -> frozenset[str]:
    """Which of b, h, q, k, row the expression depends on."""
    return frozenset(e.name for e in walk(expr) if isinstance(e, Index)) if expr is not None else frozenset()


def substitute(expr: Expr, names: dict[str, Expr]) -> Expr:
    """Replace indices and sizes by name (`{"q": …}`); terms are expanded only where they mention one."""
    if isinstance(expr, (Index, Size)):
        return names.get(expr.name, expr)
    if isinstance(expr, Load):
        return Load(expr.operand, tuple(substitute(i, names) for i in expr.indices))
    if isinstance(expr, Apply):
        return Apply(expr.op, tuple(substitute(a, names) for a in expr.args))
    if isinstance(expr, Term) and indices(expr) & names.keys():
        return substitute(expand_term(expr), names)
    return expr


def expand_term(term: Term) -> Expr:
    """What a named term stands for, one level deep."""
    from attnopt.ir.grammar import parse_with_parameters

    parameters, meaning = TERMS[term.name]
    return parse_with_parameters(meaning, dict(zip(parameters, (Const(a) for a in term.args), strict=True)))


def expand(expr: Expr) -> Expr:
    """The same expression with every named term replaced by its meaning."""
    if isinstance(expr, Term):
        return expand(expand_term(expr))
    if isinstance(expr, Load):
        return Load(expr.operand, tuple(expand(i) for i in expr.indices))
    if isinstance(expr, Apply):
        return Apply(expr.op, tuple(expand(a) for a in expr.args))
    return expr


def render_number(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return repr(value)


def render(expr: Expr, power: int = 0) -> str:
    """The one-line form; parentheses only where the binding powers need them."""
    if isinstance(expr, Index):
        return expr.name
    if isinstance(expr, Const):
        return render_number(expr.value)
    if isinstance(expr, Size):
        return f"size({expr.name})"
    if isinstance(expr, Load):
        return f"load({', '.join([expr.operand, *(render(i) for i in expr.indices)])})"
    if isinstance(expr, Term):
        return f"{expr.name}({', '.join(map(render_number, expr.args))})" if expr.args else expr.name
    operator = OPERATORS[expr.op]
    if not operator.symbol:
        return f"{expr.op}({', '.join(render(a) for a in expr.args)})"
    if operator.arity == 1:
        (argument,) = expr.args
        inner = render(argument, operator.power)
        text = f"{operator.symbol}({inner})" if isinstance(argument, Const) else f"{operator.symbol}{inner}"
    else:
        left, right = expr.args
        # Comparisons do not chain, so both of their sides bind tighter; other operators associate to the left.
        left_power = operator.power + 1 if operator.power == COMPARISON_POWER else operator.power
        text = f"{render(left, left_power)} {operator.symbol} {render(right, operator.power + 1)}"
    return f"({text})" if operator.power < power else text
