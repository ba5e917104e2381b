"""Which tiles hold a pair that the mask shows.

    causal & window(128), tiles of 64 x 64   ->   bool [1, 1, M, N], a band of three tiles

Masks of positions are bounds, and tiles are compared with those; what is the same for all pairs of a tile is evaluated once for each; any
other is evaluated, some queries at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import (
    Apply,
    Const,
    Expr,
    Index,
    Load,
    Term,
    apply,
    children,
    conjunction,
    conjuncts,
    disjuncts,
    expand,
    indices,
    substitute,
)
from attnopt.ir.expr import operands as loaded
from attnopt.ir.ranges import extreme, key_range
from attnopt.ir.reference import query_offset
from attnopt.ir.spec import AttentionSpec

STRIP = 64  # queries that are looked at together
INTERVALS = (
    "causal",
    "window",
    "lookahead",
    "chunk",
    "near_blocks",
    "global",
    "last",
)  # neighbouring queries see intervals that touch


def shown_tiles(spec: AttentionSpec, q: Tensor, k: Tensor, operands: Mapping[str, Tensor], rows: int, keys: int) -> Tensor:
    """bool [B | 1, H | 1, ceil(Q / rows), ceil(K / keys)] for q [B, H, Q, D], k [B, G, K, D]."""
    grid = Grid(q.shape[0], q.shape[1], q.shape[2], k.shape[2], query_offset(spec, q.shape[2], k.shape[2]), q.device)
    return of_parts(conjuncts(unsettled(spec, q, k, operands)), grid, operands, rows, keys)


def of_parts(parts: Sequence[Expr], grid: Grid, operands: Mapping[str, Tensor], rows: int, keys: int) -> Tensor:
    """The tiles of `a & b & …`. Of an alternative those of its arms, one by one: most are bounds alone."""
    told = [p for p in parts if grid.offset % rows == 0 and not is_interval(p) and by_tiles(p, rows, keys)]
    left = [p for p in parts if p not in told]
    mask, either = conjunction(*left), [p for p in left if len(disjuncts(p)) > 1]
    if mask is None:
        found = torch.ones(1, 1, -(-grid.q_len // rows), -(-grid.kv_len // keys), dtype=torch.bool, device=grid.device)
    elif is_bounds(mask):
        found = by_bounds(mask, grid.q_len, grid.kv_len, grid.offset, rows, keys, torch.device(grid.device))
    elif len(either) == 1:
        rest = [p for p in left if p is not either[0]]
        arms = [of_parts([*rest, *conjuncts(arm)], grid, operands, rows, keys) for arm in disjuncts(either[0])]
        found = functools.reduce(torch.logical_or, arms)
    else:
        found = by_pairs(mask, grid, operands, rows, keys)
    for part in told:
        found = found & evaluate(part, replace(grid, q_step=rows, k_step=keys), operands).bool()
    return found


def by_pairs(mask: Expr, grid: Grid, operands: Mapping[str, Tensor], rows: int, keys: int) -> Tensor:
    """Every pair is looked at, some queries at a time."""
    found = []
    strip = -(-STRIP // rows) * rows
    for first in range(0, grid.q_len, strip):
        here = min(strip, grid.q_len - first)
        sizes = {"q": grid.q_len, "k": grid.kv_len}
        seen = evaluate(mask, replace(grid, q_len=here, sizes=sizes, first_row=first), operands).bool()
        seen = seen.expand(*seen.shape[:2], here, grid.kv_len)
        seen = torch.stack([part.any(-1) for part in seen.split(keys, -1)], -1)
        found.append(seen if rows == 1 else torch.stack([part.any(2) for part in seen.split(rows, 2)], 2))
    return torch.cat(found, 2)


def unsettled(spec: AttentionSpec, q: Tensor, k: Tensor, operands: Mapping[str, Tensor]) -> Expr | None:
    """What these data leave of the mask: without parts that show everything, as where all tokens are of one document, none padding."""
    grid = Grid(q.shape[0], q.shape[1], q.shape[2], k.shape[2], query_offset(spec, q.shape[2], k.shape[2]), q.device)
    return conjunction(*(part for part in conjuncts(spec.mask) if not holds(part, grid, operands)))


def holds(part: Expr, grid: Grid, operands: Mapping[str, Tensor]) -> bool:
    """Whether data alone show that a part hides nothing: a value of keys that is true, or one that equals that of each query."""
    expr = expand(part)
    if not loaded(expr):
        return False
    if indices(expr) <= {"b", "h", "k"}:
        return bool(evaluate(expr, grid, operands).bool().all())
    if (
        not isinstance(expr, Apply)
        or expr.op != "eq"
        or {"q", "k"} <= indices(expr.args[0])
        or {"q", "k"} <= indices(expr.args[1])
    ):
        return False
    sides = [evaluate(side, grid, operands) for side in expr.args]
    first = sides[0][..., :1, :1]
    return all(bool((side == first).all()) for side in sides)


def by_tiles(part: Expr, rows: int, keys: int) -> bool:
    """Whether a part of a mask is the same for all pairs of a tile, so that the list says all of it.

    near_blocks(256, 4), tiles of 64 x 64   ->   True: it reads q // 256 and k // 256
    """
    expr = expand(part)
    if isinstance(expr, Index):
        return expr.name in ("b", "h")
    if isinstance(expr, Load):
        return False
    if isinstance(expr, Apply) and isinstance(expr.args[0], Index) and isinstance(expr.args[-1], Const):
        name, n = expr.args[0].name, expr.args[-1].value
        size = {"q": rows, "row": rows, "k": keys}.get(name, 1)
        if expr.op in ("floordiv", "lt", "ge") and isinstance(n, int):
            return n % size == 0
    return all(by_tiles(child, rows, keys) for child in children(expr))


def is_bounds(mask: Expr) -> bool:
    """Whether a block of queries sees exactly the keys between the bounds of `key_range`, and the leading ones."""
    parts = conjuncts(mask)
    either = [part for part in parts if isinstance(part, Apply) and part.op == "or"]
    return len(either) <= 1 and all(is_interval(p) or is_led(p) for p in parts)


def is_interval(part: Expr) -> bool:
    return isinstance(part, Term) and part.name in INTERVALS


def is_led(part: Expr) -> bool:
    """`window(w) | global(n)`; an end that only one of the arms has bounds nothing."""
    arms = disjuncts(part)
    leads = [arm for arm in arms if isinstance(arm, Term) and arm.name == "global"]
    others = [arm for arm in arms if arm not in leads]
    return len(leads) == len(others) == 1 and isinstance(others[0], Term) and others[0].name == "window"


def by_bounds(mask: Expr, q_len: int, kv_len: int, offset: int, rows: int, keys: int, device: torch.device) -> Tensor:
    bounds = key_range(mask)
    grid = Grid(1, 1, q_len, kv_len, offset, device, q_step=rows)
    count = -(-q_len // rows)
    last = apply("min", apply("add", Index("q"), rows - 1), q_len - 1 + offset)

    def at(values: tuple[Expr, ...], op: str, otherwise: int) -> Tensor:
        if not values:
            return torch.full((count, 1), otherwise, device=device)
        placed = substitute(extreme(op, values), {"q_first": Index("q"), "q_last": last})
        return evaluate(placed, grid).expand(1, 1, count, 1)[0, 0]

    start = torch.arange(0, kv_len, keys, device=device)
    first, end = at(bounds.first, "max", 0).clamp(min=0), at(bounds.end, "min", kv_len)
    seen = (start < end) & (start + keys > first) & (end > first)
    if bounds.leading is not None:
        # Leading keys are under the bounds of the other parts: an end holds for them, a first key does not.
        seen |= (start < at((bounds.leading,), "min", 0)) & (start < end)
    return seen[None, None]
