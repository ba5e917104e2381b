"""Buckets of distances, as relative position tables are read: exact up to e, then logarithmic.

where(a < e, a, min(int(log(a / e) / ratio * e) + e, last))      is never negative, though a logarithm may be
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.ir.expr import Apply, Const, Expr

if TYPE_CHECKING:
    from attnopt.ir.simplify import Simplifier


def above_once_large(simplifier: Simplifier, c: Expr, a: Expr, b: Expr) -> bool:
    """b >= 0 wherever c fails, for logarithmic buckets: c is a < e, b is min(int(log(a / e) * …) + e, last) or the same bare."""
    if isinstance(b, Apply) and b.op == "min" and isinstance(b.args[1], Const) and b.args[1].value >= 0:
        b = b.args[0]
    if not (isinstance(b, Apply) and b.op == "add" and isinstance(b.args[1], Const)):
        return False
    inner, exact = b.args[0], b.args[1]
    grown = inner.args[0] if isinstance(inner, Apply) and inner.op == "int" else None
    while (
        isinstance(grown, Apply) and grown.op in ("mul", "div") and isinstance(grown.args[1], Const) and grown.args[1].value > 0
    ):
        grown = grown.args[0]
    share = grown.args[0] if isinstance(grown, Apply) and grown.op == "log" else None
    if not (isinstance(share, Apply) and share.op == "div" and share.args[1] == Const(float(exact.value))):
        return False
    below = simplifier.build("le", a, Const(int(exact.value) - 1))
    return share.args[0] == simplifier.build("float32", a) and c == below
