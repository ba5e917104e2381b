"""Whole numbers as float32: what is compared exactly there is compared as whole numbers.

float32(x) - float32(y) == 0.0    ->    x == y          for |x|, |y| <= 2^24, which float32 holds exactly
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.ir.expr import Apply, Const, Expr
from attnopt.ir.forms import is_number
from attnopt.ir.linear import Linear

if TYPE_CHECKING:
    from attnopt.ir.simplify import Simplifier

EXACT = 1 << 24  # every whole number up to here is a float32


def compared_as_whole(simplifier: Simplifier, a: Expr, b: Expr) -> Linear | None:
    """The whole number that is zero where a == b; None where float32 could round."""
    if is_number(b, 0) and isinstance(a, Apply) and a.op == "sub":
        a, b = a.args
    left, right = exact(simplifier, a), exact(simplifier, b)
    return None if left is None or right is None else left - right


def exact(simplifier: Simplifier, expr: Expr) -> Linear | None:
    """The whole number of which this is the float32, where no value of it is rounded."""
    if isinstance(expr, Const) and isinstance(expr.value, float) and expr.value.is_integer() and abs(expr.value) <= EXACT:
        return Linear(constant=int(expr.value))
    if not (isinstance(expr, Apply) and expr.op == "float32" and simplifier.whole(expr.args[0])):
        return None
    low, high = (simplifier.extent(expr.args[0], upper=upper) for upper in (False, True))
    within = low is not None and high is not None and low >= -EXACT and high <= EXACT
    return simplifier.sum(expr.args[0]) if within else None
