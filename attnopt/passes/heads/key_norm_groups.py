"""Share pooled key heads unevenly: groups with large keys serve more queries.

    key and value heads pooled to G groups by mean; n_g = |K_g|_F over the calibration tokens; m_g = (n_g - min) / (max - min)
    group g serves  a_g = round(H m_g / sum m)  query heads, at least one, neighbours in order; sum a_g = H

While the sum is too large the largest share gives one, while too small the smallest takes one; equal norms (0 / 0) give equal shares. The
source gives the group of least norm no query at all; here it keeps one. The source recomputes groups while it trains; here they are
fixed once, and the kernel reads key heads by a constant table.

Source: "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention" (KDGQA).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.heads.candidates import candidate_of, shared_by
from attnopt.passes.edits.heads.changes import HeadChanges, refuses_change
from attnopt.passes.edits.heads.groups import contiguous, divisors, shared
from attnopt.passes.edits.heads.head_pass import HeadPass, with_fitted
from attnopt.passes.edits.heads.statistics import moments

SOURCE = "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention"


@dataclass(frozen=True)
class KeyNormGroups(HeadPass):
    """Share pooled key heads unevenly: groups with large keys serve more queries.

    groups: numbers of key heads to offer; empty for every divisor of a model's but one and all.
    """

    groups: tuple[int, ...] = ()
    name: str = "key-norm-groups"
    exact: bool = False
    per: Per = "block"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        if evidence is None:
            return Refusal("norms of keys are measured on calibration data", group.name)
        if (refusal := refuses_change(group, "kvo", norms="the norm of keys by which groups differ")) is not None:
            return refusal
        block, seen = group.blocks[0], moments(group, evidence)
        if isinstance(seen, Refusal):
            return seen
        assert block.k is not None
        heads, queries = len(block.k.channels), len(block.k.channels) * shared_by(block)
        made = []
        for count in self.groups or divisors(heads)[-2:0:-1]:
            groups = contiguous(heads, count)
            norms = [pooled_norm(seen.keys, g) for g in groups]
            given = shares(norms, queries)
            if len(set(given)) == 1:
                continue  # even groups are those of mean pooling
            reads = [g for g, many in enumerate(given) for _ in range(many)]
            what = f"{heads} key and value heads pooled to {count}, which serve {', '.join(map(str, given))} query heads"
            changes = shared(block, groups, reads=reads)
            options, kind = {"groups": count}, f"{count} of {heads} heads"
            made.append(candidate_of(self.name, group, changes, what, kind, SOURCE, options))
        return with_fitted(made, group, evidence) or Refusal(
            "no uneven groups: norms of keys are equal, or there are too few heads", group.name
        )

    def changes(self, options: Mapping[str, Any], group: Group, evidence: Evidence | None) -> HeadChanges | Refusal:
        block = group.blocks[0]
        assert block.k is not None
        return shared(block, contiguous(len(block.k.channels), options["groups"]), reads=options["reads"])


def pooled_norm(keys: Tensor, group: Sequence[int]) -> float:
    """|mean of K_h|_F from the moments [H, H, D, D]."""
    at = list(group)
    return float(keys[at][:, at].diagonal(dim1=-2, dim2=-1).sum().clamp(min=0).sqrt()) / len(at)


def shares(norms: Sequence[float], queries: int) -> list[int]:
    """How many query heads each group serves: at least one each, `queries` together."""
    low, high = min(norms), max(norms)
    scaled = [(n - low) / (high - low) if high > low else 1.0 for n in norms]
    found = [max(1, round(queries * m / sum(scaled))) for m in scaled]
    while sum(found) > queries:
        found[max(range(len(found)), key=found.__getitem__)] -= 1
    while sum(found) < queries:
        found[min(range(len(found)), key=found.__getitem__)] += 1
    return found
