"""Whole-number quotients of sizes that divide exactly, such as torch leaves them where a view infers a dimension.

    view(-1, 4, n + 1, 8) of 32*batch*(n + 1)**2 // (n + 1) numbers
        batch*((4*batch*(n + 1)**2) // (batch*(n + 1)*(n + 1)))    ->    4*batch

    (n - 1) // 2 + 1    ->    (n + 1) // 2      and so it has one name, however it is written
    n - n % 64          ->    64*(n // 64)

A quotient goes where the dividend is the divisor times a polynomial with whole coefficients: then it is that polynomial for all
sizes. From a quotient by a number go the terms that it divides. What stays counts as one unknown inside of other quotients.
"""

from __future__ import annotations

from functools import lru_cache

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

QUOTIENTS = (FloorDiv, Mod, PythonMod)


@lru_cache(maxsize=4096)  # the shapes of a model repeat a few sizes
def without_quotients(expr: sympy.Expr) -> sympy.Expr:
    """The expression with every quotient that comes out even replaced by what it is, the innermost first."""
    if not expr.has(*QUOTIENTS):
        return expr
    args = [without_quotients(a) if isinstance(a, sympy.Expr) else a for a in expr.args]
    if not isinstance(expr, QUOTIENTS):
        return expr.func(*args)
    dividend, divisor = args
    if not isinstance(expr, FloorDiv):  # the rest of a division
        return dividend - divisor * without_quotients(FloorDiv(dividend, divisor))
    if divisor.is_Integer and divisor > 0:
        return by_number(dividend, int(divisor))
    return exact_quotient(dividend, divisor) or FloorDiv(dividend, divisor)


def by_number(dividend: sympy.Expr, divisor: int) -> sympy.Expr:
    """dividend // divisor with whole multiples of the divisor taken out: of a whole-numbered sum, (c p + r) // c is p + r // c."""
    terms = [term.as_coeff_Mul() for term in sympy.Add.make_args(sympy.expand(dividend))]
    if not all(c.is_Integer and (rest.is_integer or rest == 1) for c, rest in terms):
        return FloorDiv(dividend, divisor)
    taken = sum((c // divisor * rest for c, rest in terms if rest == 1 or c % divisor == 0), sympy.Integer(0))
    left = sum((c % divisor if rest == 1 else c * rest for c, rest in terms if rest == 1 or c % divisor), sympy.Integer(0))
    return taken + FloorDiv(left, divisor)


def exact_quotient(dividend: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
    """dividend / divisor as a polynomial of their unknowns, or None where it is not one with whole coefficients."""
    unknowns = sorted({*powers(dividend), *powers(divisor)}, key=str)
    named = {u: sympy.Dummy(f"n{i}", integer=True) for i, u in enumerate(unknowns)}
    try:
        a, b = (sympy.Poly(x.xreplace(named), *named.values(), domain=sympy.ZZ) for x in (dividend, divisor))
        quotient, rest = sympy.div(a, b, domain=sympy.QQ)
    except sympy.PolynomialError:
        return None
    if not rest.is_zero or not all(c.is_Integer for c in quotient.coeffs()):
        return None
    return sympy.factor_terms(quotient.as_expr()).xreplace({n: u for u, n in named.items()})


def powers(expr: sympy.Expr) -> set[sympy.Expr]:
    """What sums, products and powers are made of: symbols, and whole expressions of any other kind."""
    if expr.is_number:
        return set()
    whole_power = expr.is_Pow and expr.args[1].is_Integer and expr.args[1].is_positive
    if expr.is_Add or expr.is_Mul or whole_power:
        return {unknown for a in expr.args for unknown in powers(a)}
    return {expr}
