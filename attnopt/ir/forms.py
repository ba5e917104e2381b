"""What kind of expression this is: a choice, a number, one of several parts."""

from __future__ import annotations

import math
from typing import TypeGuard

from attnopt.ir.expr import Apply, Const, Expr


def is_infinite(expr: Expr) -> bool:
    return isinstance(expr, Const) and isinstance(expr.value, float) and math.isinf(expr.value)


def is_choice(expr: Expr) -> TypeGuard[Apply]:
    return isinstance(expr, Apply) and expr.op == "where"


def is_number(expr: Expr, number: float) -> bool:
    return isinstance(expr, Const) and not isinstance(expr.value, bool) and expr.value == number and not is_negative_zero(expr)


def is_negative_zero(expr: Const) -> bool:
    return isinstance(expr.value, float) and expr.value == 0 and math.copysign(1.0, expr.value) < 0


def split(op: str, expr: Expr) -> tuple[Expr, ...]:
    if isinstance(expr, Apply) and expr.op == op:
        return (*split(op, expr.args[0]), *split(op, expr.args[1]))
    return (expr,)
