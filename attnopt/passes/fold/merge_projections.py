"""Let all query heads read the hidden states themselves, with the projection of keys or values inside of those of queries or the output.

    (x Wq_h)(x Wk)'          ->        (x Wq_h Wk') x'            keys are the rows of x, D wide; the scale stays d^-1/2
    P_h (x Wv) Wo_h          ->        P_h x (Wv Wo_h)            values are the rows of x

One layer less, and wider heads: scores and sums of values cost D / d times as much, and queries or output D / d times the weights. That is
less only where heads are wide, as for one head of the model's width (half the weights of keys and queries). It takes one key head, of
which all query heads read the same rows; with several, each would need hidden states of its own times its own matrix, which the paper's
single matrix does not compute: refused. So are rotations and norms between, and caches, which would hold D numbers instead of d.

Source: "You Need to Pay Better Attention" (its exact folding of a single head).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.block import Block, CacheUpdate, Projection
from attnopt.ir.graph import Value
from attnopt.ir.site import Builder, Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.heads.changes import HeadChanges, layer_of, refuses_change
from attnopt.passes.edits.heads.head_map import HeadMap
from attnopt.passes.edits.heads.site import sizes_after
from attnopt.passes.edits.heads.writer import Writer
from attnopt.passes.edits.layers.writer import as_wide
from attnopt.passes.fold.fold_biases import SHIFTED, sums_to_one

WHAT = {"k": "keys", "v": "values"}
INTO = {"k": "q", "v": "o"}  # whose projection takes that of the side


@dataclass(frozen=True)
class MergeProjections:
    """Let all query heads read the hidden states themselves instead of keys and values of their own."""

    name: str = "merge-projections"
    exact: bool = True
    per: Per = "block"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        if (refusal := refuses_change(group)) is not None:
            return refusal
        refused = {s: self.refuses(group, s) for s in "kv"}
        sides = [s for s, why in refused.items() if why is None]
        if not sides:
            return refused["v"] or Refusal("nothing is merged", group.name)
        changes = changes_of(group.blocks[0], sides)
        return [
            Candidate(
                self.name,
                True,
                f"{' and '.join(WHAT[s] for s in sides)} are the hidden states themselves",
                "You Need to Pay Better Attention",
                nodes=tuple(dict.fromkeys(layer(b, t).node for b in group.blocks for s in sides for t in (s, INTO[s]))),
                options={"sides": sides},
                kind=f"{' and '.join(WHAT[s] for s in sides)} merged",
                changes=("structure",),
                removes=tuple(dict.fromkeys(layer(b, s).node for b in group.blocks for s in sides)),
                shapes={site.name: sizes_after(site, changes) for site in group.sites},
            )
        ]

    def refuses(self, group: Group, side: str) -> Refusal | None:
        """Why the projection of keys or values stays in a group of blocks."""
        for site, block in zip(group.sites, group.blocks, strict=True):
            if (why := unfit(site, block, side)) is not None:
                return why
            now, then = weights(block, side)
            if then >= now:
                return Refusal(
                    f"merged, {WHAT[side]} would take {then:,} products for each token where they take {now:,} now", site.name
                )
        return None

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it."""
        sides: Sequence[str] = candidate.options["sides"]
        writer = MergedWriter(group, changes_of(group.blocks[0], sides), merged=tuple(sides))
        for site, block in zip(group.sites, group.blocks, strict=True):
            writer.block(site, block)
        return group


@dataclass
class MergedWriter(Writer):
    """merged: the sides that are the hidden states as they come."""

    merged: tuple[str, ...] = ()

    def product(self, builder: Builder, side: str, layer: Projection, parts: Sequence[tuple[Tensor, Tensor | None]]) -> Value:
        return layer.input if side in self.merged else super().product(builder, side, layer, parts)


def layer(block: Block, side: str) -> Projection:
    found = layer_of(block, side)
    assert found is not None
    return found


def unfit(site: Site, block: Block, side: str) -> Refusal | None:
    own = layer(block, side)
    if len(own.channels) != 1:
        return Refusal(f"{len(own.channels)} heads of {WHAT[side]} have matrices of their own: one is needed", site.name)
    if len(block.streams[side]) != 1 or (side == "k" and len(block.streams["q"]) != 1):
        return Refusal(f"something stands between the layer that makes {WHAT[side]} and the attention", site.name)
    if own.packed or block.part("k", CacheUpdate) is not None or block.part("v", CacheUpdate) is not None:
        return Refusal(f"{WHAT[side]} are made with others, or cached", site.name)
    if side == "v" and own.bias is not None:
        return Refusal("values have a bias", site.name, remedy="fold-biases moves it behind the attention first")
    if side == "k" and any(clause.name not in SHIFTED for clause in site.spec.score):
        return Refusal("a term of the score sees more than differences between keys", site.name)
    return sums_to_one(site)


def weights(block: Block, side: str) -> tuple[int, int]:
    """Products with weights for each token: as it is, and merged."""
    own, other = layer(block, side), layer(block, INTO[side])
    heads, width = other.channels.shape
    inside, outside = (int(x) for x in other.size)  # type: ignore[arg-type]
    wide, far = int(own.size[0]), outside if other.reads else inside  # type: ignore[arg-type]
    return width * wide + heads * width * far, heads * wide * far


def changes_of(block: Block, sides: Sequence[str]) -> HeadChanges:
    """Queries or output times the matrix of the side. What stands for the side itself only says how wide it is."""
    made: dict[str, HeadMap] = {}
    for side in sides:
        own, heads = layer(block, side), len(layer(block, INTO[side]).channels)
        rows = as_wide(own.rows()[0])  # [d, D]
        width, wide = rows.shape
        made[INTO[side]] = HeadMap(torch.arange(heads)[:, None], rows.mT.expand(heads, 1, wide, width))
        made[side] = HeadMap(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, wide, width, dtype=torch.float64))
    return HeadChanges(**made)  # type: ignore[arg-type]
