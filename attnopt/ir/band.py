"""How far from a query the keys that it sees can lie, where the mask proves it.

    causal & window(512) & padding   ->   Band(behind=511, ahead=0)
    k > q - 16 & k - q <= 4          ->   Band(behind=15, ahead=4)
    chunk(64) & causal               ->   Band(behind=63, ahead=0, block=64)
    causal & (window(64) | global(4))    ->   Band(behind=63, ahead=0, first=4)

Every part of a conjunction only takes keys away, so the narrowest bound of any part holds; parts that bound nothing (padding,
documents) are left to whoever applies the mask inside the band. `chunking` says how to cut the queries for it. Only where no part alone
bounds a side are parts read that let the first keys of the sequence be seen besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnopt.ir.expr import Apply, Const, Expr, Index, Load, Term, conjuncts, disjuncts, expand_term

FLIPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq"}
ROW, LARGEST = 64, 128  # chunks are whole multiples of ROW rows, at most LARGEST: beyond, more hidden scores than work saved
WHOLE_VECTORS = 16  # keys of a chunk are a multiple of this
Linear = tuple[int, int, int]  # of q, of k, and the constant
Reach = tuple[int | None, int | None]  # keys behind and ahead of a query; None for no bound


@dataclass(frozen=True)
class Band:
    """Keys from q - behind to q + ahead; where `block` is set, also only those of the query's own block of so many positions.

    first: so many keys at the beginning of the sequence may be seen besides.
    """

    behind: int
    ahead: int
    block: int | None = None
    first: int = 0


@dataclass(frozen=True)
class Chunking:
    """Sizes: rows of a chunk, keys beside it: the `first` of the sequence, then `behind` before its first row and the rest after."""

    rows: int
    keys: int
    behind: int
    first: int = 0


def chunking(band: Band) -> Chunking:
    """A quarter of the band is a chunk: larger ones multiply hidden scores, smaller ones gather keys more often."""
    quarter = (band.behind + band.ahead + 1) // 4
    rows = min(max(quarter // ROW * ROW, ROW), LARGEST)
    keys = band.first + rows + band.behind + band.ahead
    if band.block is not None and band.block <= keys:
        return Chunking(band.block, band.block, 0)
    whole = -(-keys // WHOLE_VECTORS) * WHOLE_VECTORS
    return Chunking(rows, whole, band.behind + whole - keys, band.first)


def band(mask: Expr | None) -> Band | None:
    """The narrowest band that the mask proves on both sides, or None."""
    parts = conjuncts(mask)
    behind, ahead = narrowest([reach(part) for part in parts])
    if behind is not None and ahead is not None:
        blocks = [int(p.args[0]) for p in parts if isinstance(p, Term) and p.name == "chunk"]
        # A window of no keys at all leaves nothing to compute; it is no reason for an empty chunk.
        return Band(max(behind, 0), max(ahead, 0), min(blocks, default=None))
    split = [(beyond, first) for part in parts if (beyond := reach_beside(part, first := first_keys(part))) is not None]
    behind, ahead = narrowest([(behind, ahead), *(beyond for beyond, _ in split)])
    if behind is None or ahead is None:
        return None
    return Band(max(behind, 0), max(ahead, 0), first=max(first for _, first in split))


def narrowest(reaches: Sequence[Reach]) -> Reach:
    return least(*(behind for behind, _ in reaches)), least(*(ahead for _, ahead in reaches))


def first_keys(part: Expr) -> int:
    """The largest n of the `k < n` among the alternatives of a part; 0 where there is none."""
    return max((below(e) for e in disjuncts(part)), default=0)


def below(expr: Expr) -> int:
    """n of `k < n`, in any spelling; 0 for anything else."""
    expr = expand_term(expr) if isinstance(expr, Term) else expr
    if not isinstance(expr, Apply) or expr.op not in FLIPPED:
        return 0
    difference, op = linear(Apply("sub", expr.args)), expr.op
    if difference is None or difference[:2] not in ((0, 1), (0, -1)):
        return 0
    constant = difference[2] if difference[1] == 1 else -difference[2]
    op = op if difference[1] == 1 else FLIPPED[op]
    return max({"lt": -constant, "le": 1 - constant}.get(op, 0), 0)


def reach_beside(part: Expr, first: int) -> Reach | None:
    """How far the other alternatives of `A | … | k < first` let a query see; None where a part has no such alternative."""
    others = [e for e in disjuncts(part) if below(e) == 0]
    if first == 0 or not others:
        return None
    reaches = [narrowest([reach(p) for p in conjuncts(e)]) for e in others]
    behind, ahead = ([r[side] for r in reaches] for side in (0, 1))
    return (None if None in behind else max(behind)), (None if None in ahead else max(ahead))  # type: ignore[type-var]


def reach(part: Expr) -> Reach:
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


def least(*bounds: int | None) -> int | None:
    return min((x for x in bounds if x is not None), default=None)
