"""Print index expressions as TVMScript: Python functions of expressions, which become part of the kernel where they are called.

    causal & load(padding, b, k)   ->   (k <= q) & padding[b, k]

`//` and `%` floor as in Python. Truth values become int32 before arithmetic; reals are float32. What a load reads stands in a
buffer of the operand's name; one that is `held` (read once for many uses) has a name of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from attnopt.codegen.buckets import is_bucket, thresholds
from attnopt.codegen.expressions import Binding, ExpressionPrinter, plain_name, printed_parts
from attnopt.ir.expr import Expr, Load, Term

RESERVED = frozenset(
    "b h q k v o row score lse distance batch heads q_len kv_len key_heads value_heads q_first q_last x i j d e n T tvm math"
    " attention k_scales k_zeros v_scales v_zeros lengths held tiles mask_mod score_mod bucket exp exp2 tanh sigmoid"
    " seen edges high tile top total decay rows turn mean empty position weight power fall rise new safe share logit sink unit walk"
    " scores weights values between start stop edge keys channels held_whole tiles_whole held_values operands given log sum"
    " pieces pieces_whole near square factor"
    " map chosen matching visited inside plain parts spans key_spans chunks match_heads first_piece found one part norms key_norms key_head"
    " key_blocks at q_t k_s v_s s_t o_t sum_t"
    " False None True and as assert async await break class continue def del elif else except finally for from global if import in"
    " is lambda nonlocal not or pass raise return try while with yield".split()
)


class Printer(ExpressionPrinter):
    """Truth values are joined by & and |, which bind more tightly than a comparison, and in vectors are bits."""

    language = "TVM"
    machines = "CPUs"
    binding = Binding(comparison=0, disjunction=1, conjunction=2, negation=5)
    calls = {
        "abs": "T.abs", "exp": "exp", "log": "T.log", "sqrt": "T.sqrt", "sin": "T.sin", "cos": "T.cos", "tanh": "tanh",
        "sigmoid": "sigmoid", "min": "T.min", "max": "T.max", "floor": "T.floor",
    }  # fmt: skip
    infix = {**ExpressionPrinter.infix, "not": "~"}
    choice = "T.Select"

    def cast(self, text: str, dtype: str) -> str:
        return f'T.cast({text}, "{dtype}")'

    def literal(self, value: bool | int | float) -> str:
        """Literals that stand alone need a type."""
        if isinstance(value, bool):
            return f"T.bool({value})"
        if isinstance(value, float):
            return f"T.float32({value!r})" if abs(value) < float("inf") else f'T.float32("{value}")'
        if abs(value) > 2**31 - 1:
            return f"T.int64({value})"
        return f"({value})" if value < 0 else repr(value)

    def floored(self, op: str, args: tuple[Expr, ...]) -> str | None:
        return None

    def power(self, exponent: Expr, base: float) -> str:
        return f"exp2({self.real(exponent, self.binding.product)} * {base!r})"

    def load(self, expr: Load) -> str:
        """One element: the operand's own type, but reals as float32 and whole numbers as int32."""
        read = f"{plain_name(expr.operand, RESERVED)}[{', '.join(self.text(index) for index in expr.indices)}]"
        kind, dtype = self.kind(expr), self.dtypes[expr.operand]
        wanted = {"float": "float32", "int": "int32", "bool": "bool"}[kind]
        return read if dtype == wanted else self.cast(read, wanted)

    def knowing(self, names: dict[Expr, str]) -> Printer:
        """A printer that knows these expressions by names."""
        return replace(self, held={**self.held, **names})


def bucket_function(term: Term, name: str) -> str:
    """A function of q and k that gives their bucket."""
    n, ratio = int(term.args[0]), float(term.args[1])
    both = term.name == "bucket"
    steps = [f'T.cast(distance >= {limit}, "int32")' for limit in thresholds(n, ratio)]
    lines = [f"def {name}(q, k):", f'    """{term}"""', f"    distance = {'T.abs(k - q)' if both else 'T.max(q - k, 0)'}",
             f"    place = T.min(distance, {n})", *(f"    place += {step}" for step in steps)]  # fmt: skip
    lines.append(f"    return place + T.Select(k > q, {2 * n}, 0)" if both else "    return place")
    return "\n".join(lines) + "\n"


def buckets_of(exprs: Iterable[Expr]) -> dict[Expr, str]:
    """The logarithmic buckets in expressions, each with the name of its function."""
    found: dict[Expr, str] = {}
    for part in (part for expr in exprs for part in printed_parts(expr)):
        if is_bucket(part) and part not in found:
            found[part] = f"bucket_{len(found)}" if found else "bucket"
    return found
