"""How far from a query the keys that it sees can lie, where the mask proves it.

    causal & window(512) & padding   ->   Band(behind=511, ahead=0)
    k > q - 16 & k - q <= 4          ->   Band(behind=15, ahead=4)
    chunk(64) & causal               ->   Band(behind=63, ahead=0, block=64)

Every part of a conjunction only takes keys away, so the narrowest bound of any part holds; parts that bound nothing (padding,
documents) are left to whoever applies the mask inside the band.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.expr import Apply, Const, Expr, Index, Load, Term, conjuncts, expand_term

FLIPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq"}
Linear = tuple[int, int, int]  # of q, of k, and the constant


@dataclass(frozen=True)
class Band:
    """Keys from q - behind to q + ahead; where `block` is set, also only those of the query's own block of so many positions."""

    behind: int
    ahead: int
    block: int | None = None


def band(mask: Expr | None) -> Band | None:
    """The narrowest band that the mask proves on both sides, or None."""
    behind: int | None = None
    ahead: int | None = None
    block: int | None = None
    for part in conjuncts(mask):
        back, forth = reach(part)
        behind, ahead = least(behind, back), least(ahead, forth)
        if isinstance(part, Term) and part.name == "chunk":
            block = least(block, int(part.args[0]))
    # A window of no keys at all leaves nothing to compute; it is no reason for an empty chunk.
    return None if behind is None or ahead is None else Band(max(behind, 0), max(ahead, 0), block)


def reach(part: Expr) -> tuple[int | None, int | None]:
    """How far back and forth one part of a mask lets a query see; None for no bound."""
    if isinstance(part, Term) and part.name == "chunk":
        n = int(part.args[0])
        return n - 1, n - 1
    if isinstance(part, Term) and part.name == "near_blocks":
        n, w = map(int, part.args)
        return (w + 1) * n - 1, (w + 1) * n - 1
    expr = expand_term(part) if isinstance(part, Term) else part
    if not isinstance(expr, Apply) or expr.op not in FLIPPED:
        return None, None
    left, right = expr.args
    difference, op = linear(Apply("sub", (left, right))), expr.op
    if difference is None:
        return None, None
    q, k, constant = difference  # q·q + k·k + constant  <op>  0
    if (q, k) == (-1, 1):
        q, k, constant, op = 1, -1, -constant, FLIPPED[op]
    if (q, k) != (1, -1):
        return None, None
    # q - k <op> -constant
    strict = op in ("lt", "gt")
    behind = -constant - strict if op in ("lt", "le", "eq") else None
    ahead = constant - strict if op in ("gt", "ge", "eq") else None
    return behind, ahead


def linear(expr: Expr) -> Linear | None:
    """A whole-number combination of q and k, or None."""
    if isinstance(expr, Index):
        return {"q": (1, 0, 0), "k": (0, 1, 0)}.get(expr.name)
    if isinstance(expr, Const):
        return (0, 0, expr.value) if isinstance(expr.value, int) and not isinstance(expr.value, bool) else None
    if not isinstance(expr, Apply):
        return None
    sides = [side for a in expr.args if (side := linear(a)) is not None]
    if len(sides) < len(expr.args) or expr.op not in ("neg", "add", "sub"):
        return None
    sign = 1 if expr.op == "add" else -1
    (q, k, constant), *others = ((0, 0, 0), *sides) if expr.op == "neg" else sides
    return q + sign * others[0][0], k + sign * others[0][1], constant + sign * others[0][2]


def follows_distance(expr: Expr) -> bool:
    """Whether the value depends on q and k only through q - k (and perhaps on b, h and lengths)."""
    if isinstance(expr, Term):
        return follows_distance(expand_term(expr))
    if isinstance(expr, Index):
        return expr.name not in ("q", "k", "row")
    if isinstance(expr, Load):
        return all(follows_distance(i) for i in expr.indices)
    if not isinstance(expr, Apply):
        return True
    if expr.op in (*FLIPPED, "ne", "sub"):
        difference = linear(Apply("sub", expr.args))
        if difference is not None:
            return difference[0] == -difference[1]
    return all(follows_distance(a) for a in expr.args)


def least(a: int | None, b: int | None) -> int | None:
    return min((x for x in (a, b) if x is not None), default=None)
