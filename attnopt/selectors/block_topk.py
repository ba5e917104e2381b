"""block_topk(block, n): the n key blocks of highest probe . mean(k), of those that hold a visible key.

    q [B, H, Q, D], k [B, G, K, D]   ->   gate [B, H, ceil(Q / rows), ceil(K / block)]   ->   its n highest in each row

With rows=1, as in the source, each query chooses for itself: a tile is visited where one of its queries chose it, and the queries
see their own choice. With rows=m they choose together, which costs a kernel less, and depends on queries up to m - 1 later than a
row's own.

Source: "MoBA: Mixture of Block Attention for Long-Context LLMs".
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.ir.clause import Clause
from attnopt.ir.selections import any_of_rows, probes, top
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec
from attnopt.selectors.pooling import for_heads, means
from attnopt.selectors.tiles import Choice, Tiles

TILE = 64  # queries that visit blocks together, where each chooses for itself


def refuses(spec: AttentionSpec, clause: Clause) -> Refusal | None:
    return None


def choose(spec: AttentionSpec, clause: Clause, q: Tensor, k: Tensor, shown: Tensor, offset: int) -> Choice:
    """shown: which blocks each query sees, or each group of `rows`, by the mask."""
    block, count, rows = clause.count(0), clause.count(1), max(1, clause.count("rows"))
    heads = q.shape[1]
    probe = q if rows == 1 else probes(q, clause)[:, :, ::rows]
    gate = probe @ for_heads(means(k, block), heads).transpose(-1, -2)
    members = torch.arange(gate.shape[-1], device=q.device)
    own = (torch.arange(q.shape[2], device=q.device)[:, None] + offset) // block
    forced = (members < clause.count("first")) | ((members <= own) & (members > own - clause.count("recent")))
    forced = any_of_rows(forced, rows)[::rows]
    chosen = top(gate.masked_fill(forced, torch.inf).masked_fill(~shown, -torch.inf), count) & shown
    if rows > 1:
        return Choice(Tiles(rows, block, chosen))
    return Choice(Tiles(1, block, chosen).merged(TILE), chosen)


def looked_at(clause: Clause) -> tuple[int, int]:
    """Queries and keys of the tiles that `choose` is shown."""
    return max(1, clause.count("rows")), clause.count(0)


def tiling(clause: Clause) -> tuple[int, int]:
    """Queries and keys of a tile."""
    rows = max(1, clause.count("rows"))
    return (TILE if rows == 1 else rows), clause.count(0)


def chooses_each(clause: Clause) -> bool:
    """Whether queries of one tile choose for themselves."""
    return max(1, clause.count("rows")) == 1
