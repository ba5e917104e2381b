"""The forms of sparse attention that are compared, and their baselines at as many pairs: blocks by chance, and a plain window.

chance(spec, q, k)   ->   blocks(64, 64, operand=by_chance), with as many tiles of each row       window(length, 0.25)   ->   window(137)

Chance has the tiles that a selection chooses, those of a mask in blocks, and single keys where a mask is of windows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnopt.ir.expr import Expr, Term, children
from attnopt.ir.reference import rows_of
from attnopt.ir.selections import SELECTIONS
from attnopt.ir.spec import AttentionSpec, parse
from attnopt.passes.sparsity import changed

CHANCE = "by_chance"
FORMS = {
    "SpargeAttn, half of the tiles": "pooled_blocks(64, 64, share=0.5, similarity=-0.1, first=1)",
    "SpargeAttn, a quarter": "pooled_blocks(64, 64, share=0.25, similarity=-0.1, first=1)",
    "SpargeAttn, mass 0.9": "pooled_blocks(64, 64, mass=0.9, similarity=0.3, first=1)",
    "SpargeAttn, tiles of 32, a quarter": "pooled_blocks(32, 32, share=0.25, similarity=-0.1, first=1)",
    "MoBA, 6 blocks of 64": "block_topk(64, 6)",
    "MoBA, 3 blocks of 64": "block_topk(64, 3)",
    "MoBA, 8 blocks of 32": "block_topk(32, 8)",
    "64 queries choose 6 blocks of 64": "block_topk(64, 6, rows=64, first=1)",
    "Quest, 16 pages of 16": "pages(16, 16, recent=1)",
    "Quest, 8 pages of 16": "pages(16, 8, recent=1)",
    "PowerAttention, blocks of 32": "(near_blocks(32, 4) | power_blocks(32) | global(32))",
    "Big Bird, 3 blocks of 32 by chance": "(near_blocks(32, 2) | causal_random_blocks(32, 2, 3, 812) | global(32))",
    "window 64, every 4th of 512": "(window(64) | window(512) & dilated(4))",
    "4 sinks and window 64": "(window(64) | global(4))",
    "4 sinks and window 64, delta 64": "(window(64) | global(4)) delta(64, dense=causal)",
    "4 sinks and window 64, delta 16": "(window(64) | global(4)) delta(16, dense=causal, tail=16)",
}
LONG = (
    "SpargeAttn, a quarter",
    "MoBA, 6 blocks of 64",
    "64 queries choose 6 blocks of 64",
    "Quest, 8 pages of 16",
    "PowerAttention, blocks of 32",
    "4 sinks and window 64",
    "4 sinks and window 64, delta 64",
)  # at the lengths that a model reaches at most
GRAINS = {
    "pooled_blocks": (0, 1),
    "block_topk": (None, 0),
    "pages": (None, 0),
}  # which counts of a clause are rows and keys of a tile
IN_BLOCKS = ("near_blocks", "power_blocks", "causal_random_blocks")  # terms of masks, whose first number is the block


def spec_of(spec: AttentionSpec, form: str) -> AttentionSpec:
    return changed(spec, form)


def visible(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, **operands: Tensor) -> Tensor:
    """bool [B, H, Q, K]."""
    return rows_of(spec.with_(correction=None), q, k, v, operands).visible


def window(length: int, kept: float) -> int:
    """The narrowest causal window that shows this share of the pairs."""
    wanted = kept * length * (length + 1) / 2
    # sum over queries of min(q + 1, w)
    return next((w for w in range(1, length) if w * length - w * (w - 1) / 2 >= wanted), length)


def chance(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, seed: int = 0) -> tuple[AttentionSpec, dict[str, Tensor]]:
    """The spec with tiles by chance instead of its selection or its narrower mask, as many in each row, and its operand."""
    dense = spec.with_(mask=Term("causal"), selection=None, correction=None)
    rows = rows_of(dense, q, k, v, {})
    if spec.selection is None:
        chosen = visible(spec, q, k, v)
    else:
        chosen = SELECTIONS[spec.selection.name](rows, spec.selection).visible & rows.visible
    height, width = grain(spec)
    tiles, shown = (in_tiles(x, height, width) for x in (chosen, rows.visible))
    rank = torch.rand(tiles.shape, generator=torch.Generator().manual_seed(seed)).masked_fill(~shown, -1.0)
    rank[..., 0] = 2.0
    last = shown.sum(-1, keepdim=True) - 1  # causal: what is shown are the first tiles
    rank.scatter_(-1, last, 2.0)
    order = rank.argsort(-1, descending=True).argsort(-1)
    found = (order < tiles.sum(-1, keepdim=True)) & shown
    made = parse(f"softmax blocks({height}, {width}, operand={CHANCE})").selection
    return dense.with_(selection=made), {CHANCE: found}


def grain(spec: AttentionSpec) -> tuple[int, int]:
    """Rows and keys of what is shown or hidden as one."""
    clause = spec.selection
    if clause is None:
        return (max(blocks),) * 2 if (blocks := list(blocks_of(spec.mask))) else (1, 1)
    at_rows, at_keys = GRAINS[clause.name]
    rows = clause.count("rows") if clause.name == "block_topk" else 1 if at_rows is None else clause.count(at_rows)
    return max(1, rows), clause.count(at_keys)


def blocks_of(expr: Expr | None) -> Iterator[int]:
    if isinstance(expr, Term) and expr.name in IN_BLOCKS:
        yield int(expr.args[0])
    for child in () if expr is None else children(expr):
        yield from blocks_of(child)


def in_tiles(x: Tensor, height: int, width: int) -> Tensor:
    x = x if width == 1 else torch.stack([part.any(-1) for part in x.split(width, -1)], -1)
    return x if height == 1 else torch.stack([part.any(-2) for part in x.split(height, -2)], -2)
