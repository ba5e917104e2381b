"""How many pairs of a query and a key a kernel computes that works in blocks: all of every block that the mask does not rule out.

    causal, 1024 x 1024, blocks of 128 x 128   ->   36 of 64 blocks          each query's own count is half of all, and less

Where the mask is bounds alone (`ranges`), blocks are counted in closed form. What only data decides counts as visible.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from attnopt.ir.cost import keys_per_query, optimistic
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Const, Expr, Index, apply, conjunction, conjuncts, substitute
from attnopt.ir.ranges import Range, extreme, key_range

BLOCKS, ROWS = 8, 16  # where there is no closed form: so many blocks of queries, and so many rows of each, evenly spread


@lru_cache(maxsize=1024)  # the layers of a model, and the points of a frontier, ask the same again and again
def visited_pairs(mask: Expr | None, q: int, k: int, offset: int = 0, rows: int = 1, keys: int = 1) -> float:
    """Pairs in the blocks of `rows` x `keys` that hold a pair that the mask shows; blocks at the borders are smaller.

    q, k: how many queries and keys. offset: position of the first query. Exact for masks that are bounds; else from a sample.
    """
    shown = conjunction(*(p for p in map(optimistic, conjuncts(mask)) if p != Const(True)))
    if shown is None or not q or not k:
        return float(q * k)
    bounds = key_range(shown)
    if bounds.undecided is None:
        return by_bounds(bounds, q, k, offset, rows, keys)
    if rows == keys == 1:
        return q * keys_per_query(shown, q, k, offset, k)
    return by_looking(shown, q, k, offset, rows, keys)


def by_bounds(bounds: Range, q: int, k: int, offset: int, rows: int, keys: int) -> float:
    """first <= key < end of every block of queries, widened to whole blocks of keys, and the leading keys before them."""
    starts = torch.arange(0, q, rows)

    def at(values: tuple[Expr, ...], op: str, otherwise: int) -> torch.Tensor:
        if not values:
            return torch.full_like(starts, otherwise)
        # The index q runs over the first queries of the blocks, in steps; the last of a block is so much further.
        last = apply("min", apply("add", Index("q"), rows - 1), q - 1 + offset)
        placed = substitute(extreme(op, values), {"q_first": Index("q"), "q_last": last})
        return evaluate(placed, Grid(1, 1, q, k, offset, q_step=rows)).expand(1, 1, len(starts), 1).flatten().clamp(0, k)

    first, end = at(bounds.first, "max", 0) // keys * keys, at(bounds.end, "min", k)
    end = torch.where(end > first, (-(-end // keys) * keys).clamp(max=k), first)
    lead = at((bounds.leading,), "min", 0) if bounds.leading is not None else torch.zeros_like(starts)
    leading = torch.minimum(-(-lead // keys) * keys, first)
    return float(((q - starts).clamp(max=rows) * (end - first + leading)).sum())


def by_looking(shown: Expr, q: int, k: int, offset: int, rows: int, keys: int) -> float:
    """Some rows of some blocks of queries, each with all its keys."""
    count = -(-q // rows)
    looked = min(count, BLOCKS)
    total = height = 0
    for block in sorted({round(i * (count - 1) / max(1, looked - 1)) for i in range(looked)}):
        start = block * rows
        here = min(rows, q - start)
        step = max(1, here // ROWS)
        moved = substitute(shown, {"row": apply("add", Index("row"), start)})
        grid = Grid(1, 1, here, k, offset + start, sizes={"q": q}, q_step=step)
        seen = evaluate(moved, grid).bool().expand(1, 1, len(range(0, here, step)), k).any(2).flatten()
        blocks = torch.nn.functional.pad(seen, (0, -k % keys)).view(-1, keys).any(1)
        widths = torch.full((len(blocks),), keys)
        widths[-1] = k - keys * (len(blocks) - 1)
        total += here * int((blocks * widths).sum())
        height += here
    return total * q / height
