"""Which keys a query may see when data decides: the selection slot, one function a name.

    SELECTIONS["block_topk"](rows, clause)  ->  Selected(bool [B, H, Q, K], factor on the finished weights or None)

What a selection shows is still subject to the mask. Protected keys (sinks, recent) are kept besides the n chosen ones; protected
blocks count among the n, as in their sources.

Sources: "Loki" and "LRQK" (top_keys by proxies), "SparseK", "MoBA" and "ActQKV" (block_topk), "NSA" (compressed_topk), "Quest"
(pages), "SpargeAttn" (pooled_blocks), and for keep: "A simple and effective L2 norm-based strategy for KV cache compression",
"Q-Filters", "SnapKV", "Expected Attention".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ir.clause import Clause
from attnopt.ir.rows import Rows


@dataclass(frozen=True)
class Selected:
    visible: Tensor
    factor: Tensor | None = None


def top(x: Tensor, count: int) -> Tensor:
    """True at the `count` largest entries of the last axis."""
    chosen = x.topk(min(count, x.shape[-1]), -1, sorted=False).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, chosen, True)


def block_members(length: int, block: int, device: torch.device) -> Tensor:
    return torch.arange(length, device=device) // block


def block_reduce(x: Tensor, block: int, how: str) -> Tensor:
    """Reduce blocks of rows: [B, H, L, D] -> [B, H, ceil(L / block), D]; the last block may be short."""
    return torch.stack([getattr(part, how)(2) for part in x.split(block, 2)], 2)


def any_in_block(visible: Tensor, block: int) -> Tensor:
    """[…, K] -> […, ceil(K / block)]: does the block hold a visible key?"""
    return torch.stack([part.any(-1) for part in visible.split(block, -1)], -1)


def spread_blocks(chosen: Tensor, block: int, length: int) -> Tensor:
    return chosen.repeat_interleave(block, -1)[..., :length]


def newest(rows: Rows, clause: Clause) -> Tensor:
    """The `recent` keys up to each query's own."""
    distance = rows.q_position - rows.k_position
    return ((distance >= 0) & (distance < clause.count("recent"))).expand_as(rows.visible)


def top_keys(rows: Rows, clause: Clause) -> Selected:
    """`top_keys(n)`: the n visible keys of highest score, besides the `recent` newest.

    Ranked by the scores, by those of q and k in the basis [D, R] or [H, D, R], or by those of proxies query [B, H, Q, R] and key
    [B, H, K, R].
    """
    scores, call = rows.scores, rows.call
    basis, query, key = (call.operand_or_none(clause, name) for name in ("basis", "query", "key"))
    if basis is not None:
        basis = rows.per_head(basis, 0) if basis.ndim == 3 else basis
        scores = (rows.q @ basis) @ (rows.k @ basis).transpose(-1, -2)
    if query is not None or key is not None:
        query = rows.q if query is None else query
        key = rows.k if key is None else rows.per_head(key, 1)
        scores = query @ key.transpose(-1, -2)
    recent = newest(rows, clause)
    chosen = top(scores.masked_fill(~rows.visible | recent, -torch.inf), clause.count(0))
    return Selected(chosen | recent)


def sparsek(rows: Rows, clause: Clause) -> Selected:
    """`sparsek(n, u)`: the n visible keys of highest u_j; their values weigh clip(u_j - tau, 0, 1), which sums to n.

    The `recent` newest keys are seen besides, at their full weight.
    """
    recent = newest(rows, clause)
    old = rows.visible & ~recent
    u = rows.call.value(clause.expr(1)).expand_as(old).masked_fill(~old, -torch.inf)
    count = clause.count(0)
    finite = u.masked_fill(~old, 0.0)
    low, high = finite.amin(-1, keepdim=True) - 1.0, finite.amax(-1, keepdim=True)
    for _ in range(80):  # bisection: the sum falls from the number of keys to zero as tau grows
        middle = (low + high) / 2
        enough = (u - middle).clamp(0.0, 1.0).sum(-1, keepdim=True) >= count
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    few = old.sum(-1, keepdim=True) <= count
    return Selected(top(u, count) | recent, torch.where(few | recent, torch.ones_like(u), (u - low).clamp(0.0, 1.0)))


def block_topk(rows: Rows, clause: Clause) -> Selected:
    """`block_topk(block, n)`: the n key blocks of highest probe . mean(k) among those with a visible key.

    The `first` blocks and the `recent` ones up to the query's own are among them. rows=m: m queries choose together, of all blocks that
    one of them sees, by their mean, or their sum weighted by how far each channel of theirs is from that mean (probe=activation).
    """
    block, count = clause.count(0), clause.count(1)
    length = rows.k.shape[2]
    gate = probes(rows.q, clause) @ block_reduce(rows.k, block, "mean").transpose(-1, -2)
    members = torch.arange(gate.shape[-1], device=gate.device)
    own = rows.q_position // block
    forced = (members < clause.count("first")) | ((members <= own) & (members > own - clause.count("recent")))
    together = max(1, clause.count("rows"))
    shown = any_of_rows(any_in_block(rows.visible, block), together)
    gate = gate.masked_fill(any_of_rows(forced, together), torch.inf).masked_fill(~shown, -torch.inf)
    return Selected(spread_blocks(top(gate, count), block, length))


def any_of_rows(x: Tensor, rows: int) -> Tensor:
    """[…, Q, N] -> the same: is it true of some row of the group?"""
    return x if rows == 1 else torch.cat([part.any(-2, keepdim=True).expand_as(part) for part in x.split(rows, -2)], -2)


def probes(q: Tensor, clause: Clause) -> Tensor:
    """A probe for each query, [B, H, Q, D]."""
    shared = []
    for part in q.split(max(1, clause.count("rows")), 2):
        mean = part.mean(2, keepdim=True)
        if clause.word("probe") == "activation":
            distance = (part - mean).square()
            variance = distance.mean(2, keepdim=True)
            bias = (distance / torch.where(variance == 0, torch.ones_like(variance), variance)).sum(-1, keepdim=True)
            total = bias.sum(2, keepdim=True)
            weight = torch.where(total == 0, torch.full_like(bias, 1 / part.shape[2]), bias / total.clamp(min=1e-300))
            mean = (weight * part).sum(2, keepdim=True)
        shared.append(mean.expand_as(part))
    return torch.cat(shared, 2)


def compressed_topk(rows: Rows, clause: Clause) -> Selected:
    """`compressed_topk(block, n)`: the n blocks that a softmax over the means of complete past blocks favours.

    Averaged over the heads that share keys; the first block, the query's own and the one before are among them.
    """
    block, count = clause.count(0), clause.count(1)
    means = torch.stack([part.mean(-1) for part in rows.scores.split(block, -1)], -1)
    members = torch.arange(means.shape[-1], device=means.device)
    complete = (members + 1) * block - 1 <= rows.q_position
    chance = torch.nan_to_num(torch.softmax(means.masked_fill(~complete, -torch.inf), -1), nan=0.0)
    own = rows.q_position // block
    forced = (members == 0) | (members == own) | (members == own - 1)
    gate = rows.by_group(chance).masked_fill(forced, torch.inf).masked_fill(~any_in_block(rows.visible, block), -torch.inf)
    return Selected(spread_blocks(top(gate, count), block, rows.k.shape[2]))


def pages(rows: Rows, clause: Clause) -> Selected:
    """`pages(size, n)`: the n pages of highest sum_c max(q_c min_c, q_c max_c), an upper bound on their scores.

    low, high [B, G, P, D]: the smallest and largest channels, where a cache keeps them. The `recent` pages up to the query's own are
    among the n. group: heads that share keys go by the mean, or by the largest, of their bounds.
    """
    size, count = clause.count(0), clause.count(1)
    low, high = (
        block_reduce(rows.k, size, how) if rows.call.operand_or_none(clause, name) is None
        else rows.per_head(rows.call.operand(clause, name), 1)
        for name, how in (("low", "amin"), ("high", "amax"))
    )  # fmt: skip
    q = rows.q[:, :, :, None]
    bound = torch.maximum(q * low[:, :, None], q * high[:, :, None]).sum(-1)
    if clause.word("group") == "max":
        shared = {int(g): bound[:, rows.key_heads == g].amax(1) for g in rows.key_heads.unique()}
        bound = torch.stack([shared[int(g)] for g in rows.key_heads], 1)
    else:
        bound = rows.by_group(bound, clause.word("group"))
    own, members = rows.q_position // size, torch.arange(bound.shape[-1], device=bound.device)
    bound = bound.masked_fill((members <= own) & (members > own - clause.count("recent")), torch.inf)
    bound = bound.masked_fill(~any_in_block(rows.visible, size), -torch.inf)
    return Selected(spread_blocks(top(bound, count), size, rows.k.shape[2]))


def pooled_blocks(rows: Rows, clause: Clause) -> Selected:
    """`pooled_blocks(m, n)`: tiles that hold `mass` of a softmax over pooled scores, or (share > 0) that share of the tiles.

    Blocks whose rows are unlike one another (mean cosine at most `similarity`) are kept whole, and so are the `first` blocks of keys:
    with one of them no causal query is left without a key. skip: see `late_tiles`.
    """
    height, width = clause.count(0), clause.count(1)
    q_alike = alike(rows.q, height) > clause.number("similarity")  # [B, H, blocks]
    k_alike = alike(rows.k - rows.k.mean(2, keepdim=True), width) > clause.number("similarity")
    pooled = torch.stack([part.mean(-2) for part in rows.scores.split(height, -2)], -2)
    pooled = torch.stack([part.mean(-1) for part in pooled.split(width, -1)], -1)
    shown = torch.stack([part.any(-2) for part in any_in_block(rows.visible, width).split(height, -2)], -2)
    usable = shown & k_alike[:, :, None]
    chance = torch.nan_to_num(torch.softmax(pooled.masked_fill(~usable, -torch.inf), -1), nan=0.0)
    ordered, order = torch.sort(chance, dim=-1, descending=True, stable=True)
    if clause.number("share") > 0:
        keep = torch.arange(chance.shape[-1], device=chance.device) < clause.number("share") * shown.sum(-1, keepdim=True)
    else:
        keep = ordered.cumsum(-1) - ordered < clause.number("mass")
    chosen = torch.zeros_like(usable).scatter(-1, order, keep.expand_as(usable)) & usable
    first = torch.arange(shown.shape[-1], device=shown.device) < clause.count("first")
    tiles = (chosen | ~q_alike[..., None] | ~k_alike[:, :, None] | first) & shown
    visible = spread_blocks(tiles, width, rows.k.shape[2]).repeat_interleave(height, -2)[:, :, : rows.q.shape[2]]
    return Selected(visible, late_tiles(rows, visible, clause))


def alike(x: Tensor, block: int) -> Tensor:
    """Mean cosine between all pairs of rows of each block, [B, H, blocks]."""
    return block_reduce(F.normalize(x, dim=-1), block, "mean").square().sum(-1)


def late_tiles(rows: Rows, visible: Tensor, clause: Clause) -> Tensor | None:
    """skip=s: zero where a tile's values are skipped, as its scores all lie s or more below the largest that their queries have met.

    Blocks of keys are visited in order. Weights count in their sum all the same. skip_rows=m: m queries of a tile skip it together, in
    the source those of a warp; else all of them do.
    """
    height, width, skip = clause.count("skip_rows") or clause.count(0), clause.count(1), clause.number("skip")
    if skip == float("inf"):
        return None
    scores = rows.scores.masked_fill(~(visible & rows.visible), -torch.inf)
    local = torch.stack([part.amax(-1) for part in scores.split(width, -1)], -1)  # [B, H, Q, blocks]
    low = local - local.cummax(-1).values <= -skip
    low |= local == -torch.inf
    dropped = torch.stack([part.all(-2) for part in low.split(height, -2)], -2).repeat_interleave(height, -2)
    return (~spread_blocks(dropped[:, :, : scores.shape[2]], width, scores.shape[-1])).to(rows.call.dtype)


def blocks(rows: Rows, clause: Clause) -> Selected:
    """`blocks(m, n, operand=name)`: an explicit operand [B|1, H|1, ceil(Q / m), ceil(K / n)] says which tiles are visited.

    skip: see `late_tiles`.
    """
    tiles = rows.call.operand(clause, "operand").bool()
    tiles = tiles.repeat_interleave(clause.count(0), -2).repeat_interleave(clause.count(1), -1)
    visible = tiles[..., : rows.q.shape[2], : rows.k.shape[2]].expand_as(rows.visible)
    return Selected(visible, late_tiles(rows, visible, clause))


def keep(rows: Rows, clause: Clause) -> Selected:
    """`keep(n, by=…)`: what a cache keeps of its first `prompt` keys: the n of highest score, besides sinks and the `recent` last.

    Scores are smoothed over `pool` neighbours, and averaged over the heads that share keys. Later keys are kept.
    """
    length = rows.k.shape[2]
    prompt = min(length, int(rows.call.value(clause.expr("prompt"), "").flatten()[0]))
    sinks, end = clause.count("sinks"), max(0, prompt - clause.count("recent"))
    scores = rows.by_group(KEEP_BY[clause.word("by")](rows, clause, prompt), clause.word("group"))[..., :end]
    if clause.count("pool") > 1 and end:
        size = clause.count("pool")
        pooling = F.avg_pool1d if clause.word("pooling") == "mean" else F.max_pool1d
        scores = pooling(scores, size, stride=1, padding=size // 2)[..., :end]
    position = torch.arange(length, device=scores.device)
    kept = ((position < sinks) | (position >= end)).expand(*scores.shape[:2], length).clone()
    kept[..., :end] |= top(scores.masked_fill(position[:end] < sinks, -torch.inf), clause.count(0))
    return Selected(kept[:, :, None].expand_as(rows.visible))


def by_key_norm(rows: Rows, clause: Clause, prompt: int) -> Tensor:
    """Short keys first: -|k_j|."""
    return -rows.k.norm(dim=-1)


def by_filter(rows: Rows, clause: Clause, prompt: int) -> Tensor:
    """k_j . f, f [H, D] the direction of the head's queries."""
    return (rows.k * rows.per_head(rows.call.operand(clause, "filter"), 0)[:, None]).sum(-1)


def by_snap(rows: Rows, clause: Clause, prompt: int) -> Tensor:
    """Attention that the last queries of the prompt pay: `observed` [B, H, W, D], or the last `recent` rows of q."""
    scale = rows.spec.scale or 1.0
    observed = rows.call.operand_or_none(clause, "observed")
    if observed is None:
        observed = rows.q[:, :, -max(1, clause.count("recent")) :]
        position = rows.q_position[-observed.shape[2] :]
    else:
        position = torch.arange(prompt - observed.shape[2], prompt, device=rows.q.device)[:, None]
    scores = scale * observed @ rows.k.transpose(-1, -2)
    return torch.softmax(scores.masked_fill(rows.k_position > position, -torch.inf), -1).sum(-2)


def by_expected(rows: Rows, clause: Clause, prompt: int) -> Tensor:
    """E exp(q . k_j) under queries N(mean [H, D], covariance [H, D, D]), normalised over the prompt, times |v_j|."""
    scale = rows.spec.scale or 1.0
    mean, covariance = rows.call.operand(clause, "mean"), rows.call.operand_or_none(clause, "covariance")
    z = scale * (rows.k * mean.unsqueeze(-2)).sum(-1)
    if covariance is not None:
        z = z + scale**2 / 2 * ((rows.k @ covariance) * rows.k).sum(-1)
    position = torch.arange(z.shape[-1], device=z.device)
    hidden = (position < clause.count("sinks")) | (position >= prompt)
    chance = torch.nan_to_num(torch.softmax(z.masked_fill(hidden, -torch.inf), -1), nan=0.0)
    return chance * rows.v.norm(dim=-1)


def by_score(rows: Rows, clause: Clause, prompt: int) -> Tensor:
    """Any importance that is given: score=load(importance, b, h, k)."""
    return rows.call.key_value(clause.expr("score")).squeeze(-1)


KEEP_BY: dict[str, Callable[[Rows, Clause, int], Tensor]] = {
    "key_norm": by_key_norm,
    "filter": by_filter,
    "snap": by_snap,
    "expected": by_expected,
    "score": by_score,
}
SELECTIONS: dict[str, Callable[[Rows, Clause], Selected]] = {
    "top_keys": top_keys,
    "sparsek": sparsek,
    "block_topk": block_topk,
    "compressed_topk": compressed_topk,
    "pages": pages,
    "pooled_blocks": pooled_blocks,
    "blocks": blocks,
    "keep": keep,
}
