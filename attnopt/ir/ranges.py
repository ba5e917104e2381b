"""Which keys a block of queries can see, and which of them all its queries see, as closed forms of its first and last query.

    causal & window(512)   ->   seen: q_first - 511 <= k < q_last + 1          by all: q_last - 511 <= k < q_first + 1
    causal & (window(64) | global(4))   ->   the same with 63, and besides the leading keys 0 … 3
    q // 64 == k // 64     ->   seen: q_first // 64 * 64 <= k < (q_last // 64 + 1) * 64

Each part of a conjunction narrows the range. A part whose meaning is such bounds is decided; parts that are not (padding,
documents, dilation) are left to the mask, inside the range too. Of a disjunction the hull of its arms is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from attnopt.ir.expr import Apply, Const, Expr, Index, Size, apply, conjunction, conjuncts, expand, substitute, walk
from attnopt.ir.forms import split
from attnopt.ir.linear import Linear, at_most, linear

FIRST, LAST = Size("q_first"), Size("q_last")
COMPARISONS = ("lt", "le", "gt", "ge", "eq")


@dataclass(frozen=True)
class Range:
    """Bounds as expressions of q_first and q_last (positions): every one of a tuple holds, an empty tuple bounds nothing.

    first <= k < end is seen by some query, inner_first <= k < inner_end by all. leading: so many keys from 0 are seen besides.
    undecided: what the mask still has to say inside the inner range. never_empty: every query is proved to see key 0.
    """

    first: tuple[Expr, ...] = ()
    end: tuple[Expr, ...] = ()
    inner_first: tuple[Expr, ...] = ()
    inner_end: tuple[Expr, ...] = ()
    leading: Expr | None = None
    undecided: Expr | None = None
    never_empty: bool = True

    @property
    def bounded(self) -> bool:
        """Whether a block of queries sees less than all keys, or shows less than all to each of its queries."""
        return bool(self.first or self.end or self.inner_first or self.inner_end)

    @property
    def grows(self) -> bool:
        """Whether later queries see more keys."""
        return bool(self.end) and not self.first

    def __and__(self, other: Range) -> Range:
        return Range(
            self.first + other.first,
            self.end + other.end,
            self.inner_first + other.inner_first,
            self.inner_end + other.inner_end,
            self.leading if self.leading is not None else other.leading,
            conjunction(self.undecided, other.undecided),
            self.never_empty and other.never_empty,
        )


def key_range(mask: Expr | None) -> Range:
    """The range that a mask of positions q and k proves."""
    parts = [range_of(part) for part in conjuncts(mask)]
    if sum(part.leading is not None for part in parts) > 1:  # two disjunctions: their leading keys do not add up
        parts = [range_of(part) if r.leading is None else Range(undecided=part, never_empty=False)
                 for part, r in zip(conjuncts(mask), parts, strict=True)]  # fmt: skip
    return functools.reduce(Range.__and__, parts, Range())


def range_of(part: Expr) -> Range:
    expr = expand(part)
    if isinstance(expr, Apply) and expr.op == "and":
        return key_range(expr)
    if isinstance(expr, Apply) and expr.op == "or":
        return union([key_range(arm) for arm in split("or", expr)], part)
    bounds = comparison(expr)
    return Range(undecided=part, never_empty=False) if bounds is None else bounds


def union(arms: Sequence[Range], part: Expr) -> Range:
    """The hull of the arms; one that is `k < n` for a constant n becomes leading keys where the others start later."""
    leads = [arm for arm in arms if arm.undecided is None and constant_end(arm) is not None]
    others = [arm for arm in arms if arm not in leads]
    lead: Expr | None = None
    if len(leads) == 1 and others and all(arm.first and arm.leading is None for arm in others):
        lead, arms = constant_end(leads[0]), others
    if any(arm.leading is not None for arm in arms):
        return Range(undecided=part, never_empty=False)
    whole = next((arm for arm in arms if arm.undecided is None), None)
    led = [] if lead is None else [lead]  # leading keys may reach beyond the end of the others
    hull = Range(
        (extreme("min", [extreme("max", arm.first) for arm in arms]),) if all(arm.first for arm in arms) else (),
        (extreme("max", [*(extreme("min", arm.end) for arm in arms), *led]),) if all(arm.end for arm in arms) else (),
        leading=lead,
        undecided=part,
        never_empty=any(arm.never_empty for arm in [*arms, *leads]),
    )
    # What one arm shows to all queries, the disjunction does.
    if whole is None:
        return hull
    return replace(hull, inner_first=whole.inner_first, inner_end=whole.inner_end, undecided=None)


def constant_end(arm: Range) -> Expr | None:
    """n where the arm is k < n alone, n not depending on queries."""
    if arm.first or len(arm.end) != 1 or any(e in (FIRST, LAST) for e in walk(arm.end[0])):
        return None
    return arm.end[0]


def extreme(op: str, values: Sequence[Expr]) -> Expr:
    return functools.reduce(lambda a, b: a if a == b else apply(op, a, b), values)


def comparison(expr: Expr) -> Range | None:
    """The bounds that a comparison of whole numbers is; None where k does not stand in it alone, or other data does."""
    if not isinstance(expr, Apply) or expr.op not in COMPARISONS:
        return None
    left, right = (linear(side, positional) for side in expr.args)
    if left is None or right is None:
        return None
    if expr.op == "eq":
        sides = [bound(at_most(op, left, right)) for op in ("le", "ge")]
    else:
        value = at_most(expr.op, left, right)
        distance = next(((atom, c) for atom, c in value.terms if isinstance(atom, Apply) and atom.op == "abs"), None)
        if distance is None:
            sides = [bound(value)]
        else:  # |x| + rest <= 0 is x + rest <= 0 and -x + rest <= 0
            inside = linear(distance[0].args[0], positional) if distance[1] == 1 else None
            if inside is None:
                return None
            rest = value - Linear((distance,))
            sides = [bound(inside + rest), bound(inside * -1 + rest)]
    if any(side is None for side in sides):
        return None
    return functools.reduce(Range.__and__, [side for side in sides if side is not None], Range())


def positional(atom: Expr) -> bool:
    """What bounds may be made of: q, k, the lengths, and quotients of q or k by a constant."""
    if isinstance(atom, Index):
        return atom.name in ("q", "k")
    if isinstance(atom, Size):
        return atom.name in ("q", "k")
    if isinstance(atom, Apply) and atom.op == "floordiv":
        return quotient(atom, "k") is not None or quotient(atom, "q") is not None
    if isinstance(atom, Apply) and atom.op == "abs":
        inside = linear(atom.args[0], positional)
        return inside is not None and all(positional(a) for a, _ in inside.terms)
    return False


def quotient(atom: Expr, index: str) -> int | None:
    """n where the atom is index // n."""
    if isinstance(atom, Apply) and atom.op == "floordiv" and atom.args[0] == Index(index) and isinstance(atom.args[1], Const):
        n = atom.args[1].value
        return n if isinstance(n, int) and n > 0 else None
    return None


def bound(value: Linear) -> Range | None:
    """What value <= 0 says of k: an end where k counts up in it, a first key where it counts down."""
    if not all(positional(atom) for atom, _ in value.terms):
        return None
    of_key = [(atom, c) for atom, c in value.terms if atom == Index("k") or quotient(atom, "k") is not None]
    if len(of_key) != 1 or abs(of_key[0][1]) != 1 or any(isinstance(a, Apply) and a.op == "abs" for a, _ in value.terms):
        return None
    ((atom, c),) = of_key
    size = quotient(atom, "k") or 1
    rest = (value - Linear(((atom, c),))) * -c  # k // size <= rest, or >= rest
    # Of the queries of a block, the last reaches furthest where rest grows with q, and the first where it falls.
    seen, inner = at(rest, largest=c > 0), at(rest, largest=c < 0)
    if c > 0:
        end, inner_end = ((side + Linear(constant=1)) * size for side in (seen, inner))
        return Range(end=(end.expr(),), inner_end=(inner_end.expr(),), never_empty=sees_first_key(rest))
    return Range(first=((seen * size).expr(),), inner_first=((inner * size).expr(),), never_empty=False)


def at(rest: Linear, *, largest: bool) -> Linear:
    """The largest or smallest value over the queries q_first … q_last: each term moves with q one way only."""
    total = Linear(constant=rest.constant)
    for atom, c in rest.terms:
        place = LAST if (c > 0) == largest else FIRST
        total += Linear(((substitute(atom, {"q": place}) if isinstance(atom, (Index, Apply)) else atom, c),))
    return total


def sees_first_key(rest: Linear) -> bool:
    """Whether 0 <= rest for every q >= 0."""
    return rest.constant >= 0 and all(c > 0 and not isinstance(atom, Size) for atom, c in rest.terms)
