"""Tell masks from biases in what was lifted, and say both in the spec's own terms.

    add(where(k <= q & load(x0, b, k), 0.0, -3.4e38))     ->    causal & padding                (a row without key: mean)
    add(load(x1, h, row, k) + where(load(x0, b, k), 0.0, -inf))   ->   add(load(bias0, h, row, k))   padding   empty(zero)

A term hides a key where it adds the smallest finite number of its dtype, or minus infinity. Adding -10000 hides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from attnopt.ir.clause import Clause
from attnopt.ir.expr import Apply, Const, Expr, conjunction, conjuncts, operands
from attnopt.ir.simplify import Simplifier

LOWEST = {"float16": -65504.0, "bfloat16": -3.3895313892515355e38, "float32": -3.4028234663852886e38}


@dataclass
class Parts:
    """What one attention adds to its scores and hides: `fills` are conditions to see a key, with what fills the others."""

    terms: list[Clause] = field(default_factory=list)
    fills: list[tuple[Expr, float, Clause | None]] = field(default_factory=list)


def hides(number: object, dtype: str) -> bool:
    """Whether adding the number leaves a key no weight beside any visible one, and an all-hidden row even."""
    lowest = LOWEST.get(dtype, -math.inf)
    return isinstance(number, float) and (number <= lowest * 0.99 or number == -math.inf)


def read_bias(expr: Expr, dtype: str, simplifier: Simplifier, parts: Parts) -> None:
    """Take one additive term apart into biases and conditions."""
    if isinstance(expr, Apply) and expr.op == "add":
        for part in expr.args:
            read_bias(part, dtype, simplifier, parts)
        return
    if isinstance(expr, Apply) and expr.op == "where":
        condition, a, b = expr.args
        for seen, kept, fill in ((condition, a, b), (None, b, a)):
            if isinstance(fill, Const) and hides(fill.value, dtype):
                shown = simplifier.negation(condition) if seen is None else seen
                alone = simplifier.build("where", condition, *(Const(0.0) if x is kept else x for x in (a, b)))
                parts.fills.append((shown, float(fill.value), Clause("add", (alone,))))
                read_bias(kept, dtype, simplifier, parts)
                return
    if expr != Const(0.0):
        parts.terms.append(Clause("add", (expr,)))


def settle(parts: Parts, simplifier: Simplifier) -> tuple[list[Clause], Expr | None, str]:
    """(score terms, mask, empty rows). Finite fills that add up hide a row unevenly, so only one of them can be the mask."""
    finite = [f for f in parts.fills if not math.isinf(f[1])]
    infinite = [f for f in parts.fills if math.isinf(f[1])]
    filled = [f for f in finite if f[2] is None]  # written over the scores, not added
    added = [f for f in finite if f[2] is not None]
    if infinite:
        masks, kept, empty = infinite, added, "zero"
        masks = [*masks, *filled]
    else:
        masks, kept, empty = filled, added, "mean"
        if added and not filled:
            known = next((f for f in added if not operands(f[0])), added[0])
            masks, kept = [known], [f for f in added if f is not known]
    terms = [*parts.terms, *(clause for _, _, clause in kept if clause is not None)]
    mask = conjunction(*(condition for condition, _, _ in masks))
    shown = conjuncts(mask)
    return [beside(term, shown, simplifier) for term in terms], mask, empty if masks else "mean"


def beside(term: Clause, shown: Sequence[Expr], simplifier: Simplifier) -> Clause:
    """A bias under a mask: what its condition shares with the mask says nothing, since other keys are hidden anyway.

    add(where(k <= q & load(x, b, k), 0.0, low))  under  k <= q     ->     add(where(load(x, b, k), 0.0, low))
    """
    bias = term.args[0] if term.name == "add" else None
    if not isinstance(bias, Apply) or bias.op != "where":
        return term
    parts = conjuncts(bias.args[0])
    left = [part for part in parts if part not in shown]
    if len(left) == len(parts):
        return term
    condition = conjunction(*left)
    return Clause("add", (simplifier.build("where", Const(True) if condition is None else condition, *bias.args[1:]),))
