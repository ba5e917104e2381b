"""Let neighbouring query heads share one key head and one value head: the mean of theirs.

    W_K of a group = mean of its heads' W_K, W_V likewise       8 heads -> heads(8, 4), (8, 2), (8, 1)        caches shrink alike

Keys that are normalised by head are pooled first, then normalised.
Weights alone, no data; the recipe of which models are trained on afterwards. Groups = heads is the identity; identical heads lose nothing.
Without training its loss is large: it stands as what other ways of grouping are compared with.

Source: "Fast Transformer Decoding: One Write-Head is All You Need" (MQA); pooling: "GQA: Training Generalized Multi-Query Transformer
Models from Multi-Head Checkpoints".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnopt.ir.block import Rotary
from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.heads.candidates import candidate_of
from attnopt.passes.edits.heads.changes import HeadChanges, refuses_change
from attnopt.passes.edits.heads.groups import Groups, aligned, contiguous, divisors, shared
from attnopt.passes.edits.heads.head_pass import HeadPass, with_fitted
from attnopt.passes.edits.heads.statistics import of_weights

SOURCE = "Fast Transformer Decoding: One Write-Head is All You Need"


@dataclass(frozen=True)
class MeanPooling(HeadPass):
    """Let neighbouring query heads share one key head and one value head: the mean of theirs.

    groups: numbers of key heads to offer; empty for every divisor of a model's. align: turn heads towards each other first, which by
    itself changes nothing: rotations that bring their weights together (Procrustes), under positions one angle for each pair of channels.
    """

    groups: tuple[int, ...] = ()
    align: bool = False
    name: str = "mean-pooling"
    exact: bool = False
    per: Per = "block"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        if (refusal := self.refuses(group)) is not None:
            return refusal
        block = group.blocks[0]
        assert block.k is not None
        heads = len(block.k.channels)
        made = []
        for count in self.groups or divisors(heads)[-2::-1]:
            options = {"groups": count, "align": self.align}
            changes = pooled(group, contiguous(heads, count), align=self.align)
            apart = spread(block.k.rows(), contiguous(heads, count))
            what = f"{heads} key and value heads pooled to {count}, keys {apart:.2f} apart" + ", aligned" * self.align
            kind = f"{count} of {heads} heads" + ", aligned" * self.align
            made.append(candidate_of(self.name, group, changes, what, kind, SOURCE, options, needs_data=False))
        return with_fitted(made, group, None if block.k_norm is not None else evidence) or Refusal(
            "one key head already", group.name
        )

    def refuses(self, group: Group) -> Refusal | None:
        return refuses_change(group, norms="a rotation") if self.align else refuses_change(group, "kvo", norms="")

    def changes(self, options: Mapping[str, Any], group: Group, evidence: Evidence | None) -> HeadChanges | Refusal:
        block = group.blocks[0]
        assert block.k is not None
        return pooled(group, contiguous(len(block.k.channels), options["groups"]), align=options["align"])


def pooled(group: Group, groups: Groups, *, align: bool) -> HeadChanges:
    block = group.blocks[0]
    if not align:
        return shared(block, groups)
    seen = of_weights(group)
    return shared(block, groups, keys=aligned(seen.keys, groups, block.part("k", Rotary)), values=aligned(seen.values, groups))


def spread(rows: Tensor, groups: Groups) -> float:
    """Of keys [H, D, in]: sum |W_h - mean of its group|² / sum |W_h|², what pooling leaves out."""
    rows = rows.double()
    apart = sum(float((rows[list(g)] - rows[list(g)].mean(0)).square().sum()) for g in groups)
    return apart / max(float(rows.square().sum()), 1e-30)
