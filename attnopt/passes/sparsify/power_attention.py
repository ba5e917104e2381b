"""Let each block of queries see blocks of keys at distances that are powers of two, its neighbours, and the first.

    softmax scale(s) causal   ->   softmax scale(s) causal & (near_blocks(256, 4) | power_blocks(256) | global(256))

A row sees as many blocks as its position has binary digits, and every token is reached within as many layers. It is a fixed pattern:
the source goes on training with it, and its blocks hold 256 keys.

Source: "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention".
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.sparsity import applied, causal, proposed


@dataclass(frozen=True)
class PowerAttention:
    """Let each block of queries see blocks of keys at distances that are powers of two, its neighbours, and the first.

    blocks: keys of a block. near: so many blocks before the query's own are seen besides it.
    """

    blocks: tuple[int, ...] = (256, 64)
    near: int = 4
    name: str = "power-attention"
    exact: bool = False
    per: Per = "site"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        return proposed(self.name, "PowerAttention", self.lines, group, evidence)

    def lines(self, site: Site) -> dict[str, str] | Refusal:
        if not causal(site):
            return Refusal("the pattern looks back: it needs a causal mask", site.name)
        length = site.size("k")
        wide = [n for n in self.blocks if not (isinstance(length, int) and (self.near + 1) * n >= length)]
        found = {f"blocks of {n}": f"(near_blocks({n}, {self.near}) | power_blocks({n}) | global({n}))" for n in wide}
        return found or Refusal(f"the nearest blocks cover all {length} keys", site.name)

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """The group with the new mask in the spec of its site."""
        return applied(candidate, group)
