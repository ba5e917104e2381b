"""Let neighbouring query heads share one key head and one value head: the mean of theirs.

    W_K of a group = mean of its heads' W_K, W_V likewise       8 heads -> heads(8, 4), (8, 2), (8, 1)        caches shrink alike

Weights alone, no data; the recipe of which models are trained on afterwards. Groups = heads is the identity; identical heads lose nothing.
Without training its loss is large: it stands as what other ways of grouping are compared with.

Source: "Fast Transformer Decoding: One Write-Head is All You Need" (MQA); pooling: "GQA: Training Generalized Multi-Query Transformer
Models from Multi-Head Checkpoints".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.head_candidates import candidate_of
from attnopt.passes.head_changes import HeadChanges, refuses_change
from attnopt.passes.head_groups import contiguous, divisors, shared
from attnopt.passes.head_pass import HeadPass, with_fitted

SOURCE = "Fast Transformer Decoding: One Write-Head is All You Need"


@dataclass(frozen=True)
class MeanPooling(HeadPass):
    """Let neighbouring query heads share one key head and one value head: the mean of theirs.

    groups: numbers of key heads to offer; empty for every divisor of a model's.
    """

    groups: tuple[int, ...] = ()
    name: str = "mean-pooling"
    exact: bool = False
    per: Per = "block"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        if (refusal := refuses_change(group, "kvo")) is not None:
            return refusal
        block = group.blocks[0]
        assert block.k is not None
        heads = len(block.k.channels)
        made = []
        for count in self.groups or divisors(heads)[-2::-1]:
            options, changes = {"groups": count}, shared(block, contiguous(heads, count))
            what, kind = f"{heads} key and value heads pooled to {count}", f"{count} of {heads} heads"
            made.append(candidate_of(self.name, group, changes, what, kind, SOURCE, options, needs_data=False))
        return with_fitted(made, group, evidence) or Refusal("one key head already", group.name)

    def changes(self, options: Mapping[str, Any], group: Group, evidence: Evidence | None) -> HeadChanges | Refusal:
        block = group.blocks[0]
        assert block.k is not None
        return shared(block, contiguous(len(block.k.channels), options["groups"]))
