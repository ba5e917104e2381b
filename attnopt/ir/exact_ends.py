"""A cache that keeps its first and its newest tokens as they are and rounds each of the others by itself: what its clause says of it.

    cache(k=int2, v=int2, group=128, clip=0.8, k_bits=where(k < 15, 16, 2), v_bits=…, recent=128, k_basis=hadamard, v_basis=hadamard)
        ->   ExactEnds(rows=cache(k=int2, v=int2, group=128, clip=0.8), first=15, recent=128, turned=("k", "v"))

`turned`: the sides whose rows are in a Hadamard basis when they are rounded.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from attnopt.ir.clause import Clause
from attnopt.ir.expr import Apply, Const, Expr, Index
from attnopt.ir.packing import refusal
from attnopt.ir.site import Refusal

ROUNDED = ("k", "v", "group", "clip", "scales", "levels")  # what says how a row is rounded
WHOLE = 16  # bits of a token that is as it is


@dataclass(frozen=True)
class ExactEnds:
    """rows: how tokens between the ends are rounded, in their basis. first, recent: how many at either end are exact."""

    rows: Clause
    first: int
    recent: int
    turned: tuple[str, ...]


@functools.lru_cache(maxsize=64)
def exact_ends(clause: Clause) -> ExactEnds | Refusal:
    """Or why the clause is no such cache."""
    said, recent = dict(clause.options), clause.expr("recent")
    first = {first_exact(clause.expr_or_none(f"{side}_bits"), clause.word(side)) for side in "kv"}
    count = first.pop()
    if first or count is None or not isinstance(recent, Const):
        return Refusal("which tokens are exact is no number of first and last ones", clause)
    if "fp32" in (clause.word("k"), clause.word("v")):
        return Refusal("keys or values are not in codes", clause)
    turned = tuple(side for side in "kv" if said.get(f"{side}_basis") == "hadamard")
    left = said.keys() - {*ROUNDED, "recent", *(f"{side}_{what}" for side in "kv" for what in ("bits", "basis"))}
    if left or (count, recent.value, turned) == (0, 0, ()):
        return Refusal(f"{min(left)} of the cache" if left else "all tokens are in codes", clause)
    rows = Clause("cache", (), tuple((name, said[name]) for name in ROUNDED if name in said))
    if (refused := refusal(rows)) is not None:
        return refused
    return ExactEnds(rows, count, int(recent.value), turned)


def first_exact(bits: Expr | None, storage: str) -> int | None:
    """How many first tokens `where(k < n, 16, bits)` leaves as they are; None for anything else."""
    if bits is None:
        return 0
    if not isinstance(bits, Apply) or bits.op != "where":
        return None
    where, then, other = bits.args
    if then != Const(WHOLE) or other != Const(int(storage.removeprefix("int"))) or not isinstance(where, Apply):
        return None
    ((index, end),) = (where.args,) if where.op == "lt" else ((None, None),)
    return int(end.value) if index == Index("k") and isinstance(end, Const) else None
