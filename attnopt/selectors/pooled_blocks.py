"""pooled_blocks(m, n): tiles that hold a share of a softmax over the scores of pooled queries and keys.

    mean of m queries . mean of n keys   ->   softmax   ->   the fewest tiles of each row that hold `mass`, or that share of them

A block whose rows are unlike one another (mean cosine at most `similarity`; of keys, less the mean of all keys) says nothing by its
mean, and is kept whole. So are the `first` blocks of keys: without them a causal query may find that none of its tiles holds a key
that it sees, and gets what the spec gives to an empty row. Scores are pooled by pooling rows, which is exact for scaled products and
for those alone.

What is chosen for a query depends on the other queries of its tile, and whether a block of keys is alike on the mean of all keys:
on later tokens too, though no weight is ever given to one under a causal mask.

Source: "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference".
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.ir.clause import Clause
from attnopt.ir.site import Refusal
from attnopt.ir.spec import AttentionSpec
from attnopt.selectors.pooling import alikeness, for_heads, means
from attnopt.selectors.tiles import Choice, Tiles


def refuses(spec: AttentionSpec, clause: Clause) -> Refusal | None:
    """None where pooled rows score as pooled scores do."""
    if spec.scale is None or len(spec.score) != sum(c.name == "scale" for c in spec.score):
        terms = " ".join(str(c) for c in spec.score)
        return Refusal(f"scores are pooled by pooling rows, which holds for scaled products, not for '{terms}'", clause)
    return None


def choose(spec: AttentionSpec, clause: Clause, q: Tensor, k: Tensor, shown: Tensor, offset: int) -> Choice:
    """shown: tiles of `tiling` that the mask shows."""
    height, width = tiling(clause)
    heads, least = q.shape[1], clause.number("similarity")
    q_alike = alikeness(q, height) > least  # [B, H, M]
    k_alike = for_heads(alikeness(k - k.mean(2, keepdim=True), width) > least, heads)  # [B, H, N]
    scores = (spec.scale or 1.0) * (means(q, height) @ for_heads(means(k, width), heads).transpose(-1, -2))
    usable = shown & k_alike[:, :, None]
    chance = torch.nan_to_num(torch.softmax(scores.masked_fill(~usable, -torch.inf), -1), nan=0.0)
    ordered, order = torch.sort(chance, dim=-1, descending=True, stable=True)
    if clause.number("share") > 0:
        keep = torch.arange(chance.shape[-1], device=q.device) < clause.number("share") * shown.sum(-1, keepdim=True)
    else:
        keep = ordered.cumsum(-1) - ordered < clause.number("mass")
    chosen = torch.zeros_like(usable).scatter(-1, order, keep.expand_as(usable)) & usable
    first = torch.arange(shown.shape[-1], device=q.device) < clause.count("first")
    return Choice(Tiles(height, width, (chosen | ~q_alike[..., None] | ~k_alike[:, :, None] | first) & shown))


def looked_at(clause: Clause) -> tuple[int, int]:
    """Queries and keys of the tiles that it is shown."""
    return tiling(clause)


def tiling(clause: Clause) -> tuple[int, int]:
    """Queries and keys of a tile."""
    return clause.count(0), clause.count(1)


def chooses_each(clause: Clause) -> bool:
    """Whether queries of one tile choose for themselves."""
    return False
