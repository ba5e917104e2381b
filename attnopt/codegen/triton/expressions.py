"""Print index expressions as Triton: the same tree as `evaluate`, on a tile of queries along the first axis and keys along the second.

    causal & load(padding, b, k)   ->   (k <= q) & tl.load(p_padding + b * s_padding_0 + k * s_padding_1, mask=m_k)

Numbers differ from Python's in three places: `//` and `%` of Triton truncate, so they are floored here unless both sides are
proved not to be negative; truth values are one bit wide, so they become int32 before arithmetic; reals are float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from attnopt.codegen.buckets import is_bucket, thresholds
from attnopt.codegen.expressions import Binding, ExpressionPrinter, plain_name, printed_parts
from attnopt.ir.expr import Const, Expr, Index, Load, Term, indices

RESERVED = frozenset(
    "b h q k v o row score place bucket distance m_k x a n lse batch heads q_len kv_len key_heads value_heads tensors"
    " rows kn vn tl torch triton prefill attention ks kz vs vz kd ve steps i part stats pages lengths k_scales k_zeros"
    " v_scales v_zeros splits ratio programs processors blocks math functools decode merge q_scales v_means shifts"
    " deltas".split()
)  # fmt: skip


class Printer(ExpressionPrinter):
    """Truth values are joined by & and |, which bind more tightly than a comparison."""

    language = "Triton"
    machines = "GPUs"
    binding = Binding(comparison=0, disjunction=1, conjunction=2, negation=5)
    calls = {
        "abs": "tl.abs", "exp": "tl.exp", "log": "tl.log", "sqrt": "tl.sqrt", "sin": "tl.sin", "cos": "tl.cos", "tanh": "tanh",
        "sigmoid": "tl.sigmoid", "min": "tl.minimum", "max": "tl.maximum", "floor": "tl.floor",
    }  # fmt: skip
    infix = {**ExpressionPrinter.infix, "not": "~"}
    choice = "tl.where"

    def cast(self, text: str, dtype: str) -> str:
        return f"tl.cast({text}, tl.{dtype})"

    def literal(self, value: bool | int | float) -> str:
        """A literal; Triton has no name for infinity."""
        if isinstance(value, float) and value in (float("inf"), -float("inf")):
            return f'{"-" * (value < 0)}float("inf")'
        text = repr(value)
        if isinstance(value, int) and abs(value) > 2**31 - 1:
            return f"tl.cast({text}, tl.int64)"
        return f"({text})" if text.startswith("-") else text

    def floored(self, op: str, args: tuple[Expr, ...]) -> str | None:
        if self.never_negative(args):
            return None
        return f"{'floor_divide' if op == 'floordiv' else 'floor_modulo'}({self.number(args[0])}, {self.number(args[1])})"

    def power(self, exponent: Expr, base: float) -> str:
        return f"tl.exp2({self.real(exponent, self.binding.product)} * {base!r})"

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


def pointer(operand: str) -> str:
    """The parameter that holds an operand: p_ and its name, which no other parameter has."""
    return f"p_{plain_name(operand, RESERVED)}"


def bucket_lines(term: Term, name: str) -> list[str]:
    """Statements after which `name` holds the bucket of q and k."""
    n, ratio = int(term.args[0]), float(term.args[1])
    both = term.name == "bucket"
    lines = [f"distance = {'tl.abs(k - q)' if both else 'tl.maximum(q - k, 0)'}", f"{name} = tl.minimum(distance, {n})"]
    lines += [f"{name} += tl.cast(distance >= {limit}, tl.int32)" for limit in thresholds(n, ratio)]
    return [*lines, f"{name} += tl.where(k > q, {2 * n}, 0)"] if both else lines


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
