"""Let query heads share a key head and a value head that are the weighted sum of theirs, weighted by least squares.

    K' of a group = sum of w_h K_h R_h       min over w of  sum_h |Q_h R_h (K_h R_h - K')'|²         a system of |group| equations
    V' of a group = sum of w_h V_h R_h       min over w of  sum_h |(V_h R_h - V') R_h' W_O,h|²       one weight for each channel

Q, K and V on calibration tokens; R_h turns heads of a group towards each other first, which by itself changes nothing (`heads.groups`).
Weights and rotations are folded into the projections: what is computed is heads(H, G), as with mean pooling. Equal weights and no
rotation are mean pooling; groups = heads is the identity; identical heads lose nothing. The source finds its weights by training: the
closed form is an addition, and so are the rotations.

Source: "Weighted Grouped Query Attention in Transformers" (WGQA).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.block import Block, Rotary
from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.heads.candidates import candidate_of, shared_by
from attnopt.passes.edits.heads.changes import HeadChanges, refuses_change
from attnopt.passes.edits.heads.groups import Groups, aligned, contiguous, divisors, shared, turned_moments
from attnopt.passes.edits.heads.head_pass import HeadPass, with_fitted
from attnopt.passes.edits.heads.statistics import HeadMoments, moments

SOURCE = "Weighted Grouped Query Attention in Transformers"
NO_DATA = Refusal("its weights are found on calibration data")
RIDGE = 1e-9  # of the mean of a system's diagonal: heads that are equal leave it without a single solution


@dataclass(frozen=True)
class WeightedGroups(HeadPass):
    """Let query heads share a key head and a value head that are the weighted sum of theirs, weighted by least squares.

    groups: numbers of key heads to offer; empty for every divisor of a model's. align: turn heads towards each other first.
    """

    groups: tuple[int, ...] = ()
    align: bool = True
    name: str = "weighted-groups"
    exact: bool = False
    per: Per = "block"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        if evidence is None:
            return NO_DATA
        if (refusal := refuses_change(group, norms="a weighted sum of heads")) is not None:
            return refusal
        block, seen = group.blocks[0], moments(group, evidence)
        if isinstance(seen, Refusal):
            return seen
        assert block.k is not None
        heads = len(block.k.channels)
        made = []
        for count in self.groups or divisors(heads)[-2::-1]:
            changes = weighted(block, contiguous(heads, count), seen, align=self.align)
            what, kind = f"{heads} key and value heads as {count} weighted sums", f"{count} of {heads} heads"
            options = {"groups": count, "align": self.align}
            made.append(candidate_of(self.name, group, changes, what, kind, SOURCE, options))
        return with_fitted(made, group, evidence) or Refusal("one key head already", group.name)

    def changes(self, options: Mapping[str, Any], group: Group, evidence: Evidence | None) -> HeadChanges | Refusal:
        if evidence is None:
            return NO_DATA
        block, seen = group.blocks[0], moments(group, evidence)
        assert block.k is not None
        if isinstance(seen, Refusal):
            return seen
        return weighted(block, contiguous(len(block.k.channels), options["groups"]), seen, align=options["align"])


def weighted(block: Block, groups: Groups, seen: HeadMoments, *, align: bool) -> HeadChanges:
    assert block.o is not None
    repeats, turn = shared_by(block), block.part("k", Rotary)
    rows = block.o.rows().double()  # [Hq, E, out]
    outputs = (rows @ rows.mT).unflatten(0, (-1, repeats)).sum(1)  # [H, E, E]
    queries = seen.queries.unflatten(0, (-1, repeats)).sum(1)
    keys, values = (aligned(seen.keys, groups, turn), aligned(seen.values, groups)) if align else (None, None)
    of_keys, of_values = seen.keys, seen.values
    if keys is not None and values is not None:
        of_keys, of_values = turned_moments(of_keys, keys), turned_moments(of_values, values)
        queries, outputs = keys.mT @ queries @ keys, values.mT @ outputs @ values
    weights = {"k": by_head(of_keys, queries, groups), "v": by_channel(of_values, outputs, groups)}
    return shared(block, groups, keys=keys, values=values, weights=weights)


def by_head(cross: Tensor, metric: Tensor, groups: Groups) -> Tensor:
    """w [H] with the least  sum_h tr(metric_h (K_h - sum_j w_j K_j)' (K_h - sum_j w_j K_j))  in each group."""
    found = torch.zeros(len(cross), dtype=torch.float64)
    for group in groups:
        at = list(group)
        whole, own = metric[at].sum(0), cross[at][:, at]
        a = torch.einsum("ab,ijab->ij", whole, own)
        b = torch.einsum("hab,ihab->i", metric[at], own)
        found[at] = solved((a + a.mT) / 2, b)
    return found


def by_channel(cross: Tensor, metric: Tensor, groups: Groups) -> Tensor:
    """The same with a weight for each channel: w [H, E]."""
    heads, width = len(cross), cross.shape[-1]
    found = torch.zeros(heads, width, dtype=torch.float64)
    for group in groups:
        at = list(group)
        whole, own = metric[at].sum(0), cross[at][:, at]
        a = (own * whole).permute(0, 2, 1, 3).reshape(len(at) * width, -1)
        b = torch.einsum("hab,ihab->ia", metric[at], own).flatten()
        found[at] = solved((a + a.mT) / 2, b).unflatten(0, (len(at), width))
    return found


def solved(a: Tensor, b: Tensor) -> Tensor:
    ridge = RIDGE * a.diagonal().mean().clamp(min=1e-30)
    return torch.linalg.solve(a + ridge * torch.eye(len(a), dtype=a.dtype), b)
