"""Compute a whole attention by one kernel instead of node by node.

    matmul, mul, add, softmax, matmul   ->   attention(spec)

The spec stays as it is, so the rewrite is exact; which kernel computes it is the choice of the planner among the lowerings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per


@dataclass(frozen=True)
class FuseAttention:
    """Compute a whole attention by one kernel instead of node by node."""

    name: str = "fuse-attention"
    exact: bool = True
    per: Per = "site"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        read = next((s for s in group.sites if s.weights_used is not None), None)
        if read is not None:
            return Refusal("the attention weights themselves are read, and a fused kernel never makes them", read.weights_used)
        return [Candidate(self.name, True, "one kernel for the whole attention", kind="fused", changes=("kernel",))]

    def apply(self, candidate: Candidate, group: Group) -> Group:
        return replace(group, sites=tuple(site.with_step(self.name) for site in group.sites))
