"""Print index expressions as Triton: the same tree as `evaluate`, on a tile of queries along the first axis and keys along the second.

    causal & load(padding, b, k)   ->   (k <= q) & tl.load(p_padding + b * s_padding_0 + k * s_padding_1, mask=m_k)

Numbers differ from Python's in three places: `//` and `%` of Triton truncate, so they are floored here unless both sides are
proved not to be negative; truth values are one bit wide, so they become int32 before arithmetic; reals are float32.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from attnopt.codegen.triton.buckets import bucket_lines, is_bucket
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Apply, Const, Expr, Index, Load, Size, Term, children, expand_term, indices, substitute, walk
from attnopt.ir.simplify import Simplifier
from attnopt.ir.site import Refusal
from attnopt.runtime.flex_source import INFIX, is_number

# How tightly Python binds: a comparison is looser than & and |.
COMPARISON, OR, AND, SUM, PRODUCT, UNARY, ATOM = range(7)
POWERS = {"or": OR, "and": AND, "add": SUM, "sub": SUM, "mul": PRODUCT, "div": PRODUCT, "floordiv": PRODUCT, "mod": PRODUCT}
CALLS = {
    "abs": "tl.abs", "exp": "tl.exp", "log": "tl.log", "sqrt": "tl.sqrt", "sin": "tl.sin", "cos": "tl.cos", "sigmoid": "tl.sigmoid",
    "min": "tl.minimum", "max": "tl.maximum",
}  # fmt: skip
INEXACT = {"exp", "log", "tanh", "sqrt", "sin", "cos", "sigmoid", "pow", "div"}
SIZES = {"q": "q_len", "k": "kv_len"}
RESERVED = frozenset(
    "b h q k v o row score place bucket distance m_k x a n lse batch heads q_len kv_len key_heads value_heads tensors rows kn vn tl torch triton prefill attention"
    " ks kz vs vz kd ve steps i part stats pages lengths k_scales k_zeros v_scales v_zeros splits ratio programs processors blocks math functools decode merge".split()
)  # fmt: skip


@dataclass(frozen=True)
class Printer:
    """dtypes: of the operands, by name. from_zero: queries are counted from 0, so that no position is negative.

    held: loads and buckets that have a name already.
    """

    dtypes: Mapping[str, str] = field(default_factory=dict)
    from_zero: bool = True
    held: Mapping[Expr, str] = field(default_factory=dict)

    @property
    def kinds(self) -> Simplifier:
        return Simplifier(self.dtypes)

    def kind(self, expr: Expr) -> str:
        return self.kinds.kind(expr)

    def refusal(self, expr: Expr | None) -> Refusal | None:
        """None where the expression can be printed and means on a GPU what `evaluate` says."""
        for part in () if expr is None else printed_parts(expr):
            if isinstance(part, Size) and part.name not in SIZES:
                return Refusal(f"the length '{part.name}' is not known to a kernel", expr)
            if isinstance(part, Load) and part.operand not in self.dtypes:
                return Refusal(f"the type of '{part.operand}' is not known", expr)
            if isinstance(part, Apply):
                if part.op in ("floordiv", "mod") and self.kind(part) == "float" and not is_number(part):
                    return Refusal(f"'{part.op}' of reals is not printed for Triton", expr)
                if part.op == "pow" and not is_number(part) and not positive_constant(part.args[0]):
                    return Refusal("a power is printed only of a positive constant", expr)
                if part.op in ("int", "floor") and not is_number(part) and inexact(part.args[0]):
                    # log(8) / log(2) may be 2.9999998 on one machine and 3 on another.
                    return Refusal(f"'{part.op}' of a function that GPUs round in their own way", expr)
        return None

    def holding(self, exprs: Iterable[Expr]) -> tuple[Printer, list[str]]:
        """A printer that knows every load and bucket of the expressions by a name, and the lines that give these names."""
        held: dict[Expr, str] = {}
        lines: list[str] = []
        for part in (part for expr in exprs for part in reversed(list(printed_parts(expr)))):  # those inside of others first
            if part in held or not (isinstance(part, Load) or is_bucket(part)):
                continue
            name = pointer(part.operand)[2:] if isinstance(part, Load) else "bucket"
            while name in held.values():
                name += "_"
            if isinstance(part, Load):
                knowing = replace(self, held=dict(held))
                lines += [f"place = {knowing.place(part)}", f"{name} = {knowing.read(part, 'place')}"]
            elif isinstance(part, Term):
                lines += bucket_lines(part, name)
            held[part] = name
        return replace(self, held=held), lines

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
            return number(expr)
        assert isinstance(expr, Apply)
        written, own = self.apply(expr)
        return f"({written})" if own < power else written

    def apply(self, expr: Apply) -> tuple[str, int]:
        """The text and how tightly its outermost operator binds."""
        op, args = expr.op, expr.args
        if op in ("and", "or", "not"):
            power = POWERS.get(op, UNARY)
            parts = [self.truth(a, power + (i > 0)) for i, a in enumerate(args)]
            return (f"~{parts[0]}" if op == "not" else f"{parts[0]} {INFIX[op]} {parts[1]}"), power
        if op == "where":
            branches = [self.number(a) if self.kind(expr) != "bool" else self.text(a) for a in args[1:]]
            return f"tl.where({self.truth(args[0])}, {', '.join(branches)})", ATOM
        if op in ("floordiv", "mod") and not self.never_negative(args):
            return f"{'floor_divide' if op == 'floordiv' else 'floor_modulo'}({self.number(args[0])}, {self.number(args[1])})", ATOM
        if op in ("tanh", "float", "float32", "int", "floor", "pow"):
            return self.converted(op, args)
        if op == "neg":
            return f"-{self.number(args[0], UNARY)}", UNARY
        if op in CALLS:
            real = op not in ("abs", "min", "max")
            return f"{CALLS[op]}({', '.join(self.real(a) if real else self.number(a) for a in args)})", ATOM
        power = POWERS.get(op, COMPARISON)
        left, right = ((COMPARISON + 1,) * 2) if power == COMPARISON else (power, power + 1)
        parts = [self.number(args[0], left), self.number(args[1], right)]
        if op == "div" and all(self.kind(a) != "float" for a in args):
            parts[0] = self.real(args[0])
        return f"{parts[0]} {INFIX[op]} {parts[1]}", power

    def converted(self, op: str, args: tuple[Expr, ...]) -> tuple[str, int]:
        if op == "tanh":
            return f"tanh({self.real(args[0])})", ATOM
        if op == "pow":
            base = float(evaluate(args[0], Grid(1, 1, 1, 1)).double().log2())
            return f"tl.exp2({self.real(args[1], PRODUCT)} * {base!r})", ATOM
        if op == "int":
            return f"tl.cast({self.text(args[0])}, tl.int32)", ATOM
        if op == "floor":
            return (f"tl.floor({self.text(args[0])})" if self.kind(args[0]) == "float" else self.number(args[0])), ATOM
        return self.real(args[0]), ATOM

    def truth(self, expr: Expr, power: int = 0) -> str:
        """As a truth value: numbers are true where they are not zero."""
        if self.kind(expr) == "bool":
            return self.text(expr, power)
        text = f"{self.text(expr, COMPARISON + 1)} != 0"
        return f"({text})" if power > COMPARISON else text

    def number(self, expr: Expr, power: int = 0) -> str:
        """As something to calculate with."""
        return self.text(expr, power) if self.kind(expr) != "bool" or is_number(expr) else f"tl.cast({self.text(expr)}, tl.int32)"

    def real(self, expr: Expr, power: int = 0) -> str:
        if self.kind(expr) == "float":
            return self.text(expr, power)
        return repr(float(evaluate(expr, Grid(1, 1, 1, 1)))) if is_number(expr) else f"tl.cast({self.text(expr)}, tl.float32)"

    def never_negative(self, args: Iterable[Expr]) -> bool:
        """Proved: positions of rows and keys, lengths and what is made of them without a subtraction."""
        q = Index("row" if self.from_zero else "q")  # a row is never negative, a position with an offset may be
        return all(self.kinds.at_least_zero(substitute(a, {"q": q, "q_first": q, "q_last": q})) for a in args)

    def load(self, expr: Load) -> str:
        return self.read(expr, self.place(expr))

    def place(self, expr: Load) -> str:
        """The pointers: indices count in 64 bits, as the kernel has b and h, because tensors may have more elements than 32 count."""
        name = pointer(expr.operand)
        steps = [
            f"{self.text(index) if index in (Index('b'), Index('h')) else f'tl.cast({self.text(index)}, tl.int64)'} * s_{name[2:]}_{at}"
            for at, index in enumerate(expr.indices)
            if index != Const(0)
        ]
        return " + ".join([name, *steps])

    def read(self, expr: Load, place: str) -> str:
        """One element for each point; the operand's own type, but reals as float32."""
        varies = any("k" in indices(index) for index in expr.indices)
        read = f"tl.load({place}, mask=m_k, other=0)" if varies else f"tl.load({place})"
        return f"tl.cast({read}, tl.float32)" if self.kind(expr) == "float" and self.dtypes[expr.operand] != "float32" else read


def printed_parts(expr: Expr) -> Iterator[Expr]:
    """Every sub-expression; named terms are entered, but not those that are printed as a whole."""
    yield expr
    if not is_bucket(expr):
        for child in (expand_term(expr),) if isinstance(expr, Term) else children(expr):
            yield from printed_parts(child)


def number(expr: Expr) -> str:
    """A literal; Triton has no name for infinity."""
    value = evaluate(expr, Grid(1, 1, 1, 1)).item()
    if isinstance(value, float) and value in (float("inf"), -float("inf")):
        return f'{"-" * (value < 0)}float("inf")'
    text = repr(value)
    if isinstance(value, int) and abs(value) > 2**31 - 1:
        return f"tl.cast({text}, tl.int64)"
    return f"({text})" if text.startswith("-") else text


def positive_constant(expr: Expr) -> bool:
    return is_number(expr) and float(evaluate(expr, Grid(1, 1, 1, 1))) > 0


def inexact(expr: Expr) -> bool:
    return any(isinstance(e, Apply) and e.op in INEXACT and not is_number(e) for e in walk(expr))


def pointer(operand: str) -> str:
    """The parameter that holds an operand: p_ and its name, which no other parameter has."""
    name = "p_" + re.sub(r"\W", "_", operand)
    return f"{name}_operand" if name[2:] in RESERVED else name


def strides(loads: Iterable[Load]) -> dict[str, tuple[int, ...]]:
    """For each operand the dimensions in which some load moves."""
    found: dict[str, set[int]] = {}
    for load in loads:
        found.setdefault(load.operand, set()).update(at for at, index in enumerate(load.indices) if index != Const(0))
    return {name: tuple(sorted(dims)) for name, dims in found.items()}


FUNCTIONS = {
    "floor_modulo": '''\
@triton.jit
def floor_modulo(a, n):
    """a % n with the sign of n, as in Python; Triton's has that of a."""
    return (a % n + n) % n
''',
    "floor_divide": '''\
@triton.jit
def floor_divide(a, n):
    """a // n rounded down, as in Python; Triton's rounds towards zero."""
    return (a - (a % n + n) % n) // n
''',
    "tanh": '''\
@triton.jit
def tanh(x):
    """1 - 2 / (exp(2 x) + 1), which is right at both ends."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
''',
}


def called(text: str) -> tuple[str, ...]:
    """Which of `FUNCTIONS` a text calls."""
    return tuple(name for name in FUNCTIONS if re.search(rf"\b{name}\(", text))


@functools.cache
def loads_of(expr: Expr | None) -> tuple[Load, ...]:
    return () if expr is None else tuple(dict.fromkeys(e for e in walk(expr) if isinstance(e, Load)))

