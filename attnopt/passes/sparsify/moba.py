"""Let each query see the few blocks of keys whose mean it fits best, its own block among them.

    softmax scale(s) causal   ->   softmax scale(s) causal block_topk(64, 8)

The gate is q . mean(k of the block), unscaled, over blocks that have begun; one softmax over all keys of the chosen blocks. The source
trains with it, and its blocks hold 512 keys and more; put into a model that was not, it loses what the means do not show, and what
that is on calibration data orders the candidates.

Source: "MoBA: Mixture of Block Attention for Long-Context LLMs".
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.sparsity import applied, causal, proposed


@dataclass(frozen=True)
class Moba:
    """Let each query see the few blocks of keys whose mean it fits best, its own block among them.

    blocks: (keys of a block, how many are seen).
    """

    blocks: tuple[tuple[int, int], ...] = ((64, 8), (512, 3))
    name: str = "moba"
    title: str = "MoBA"
    exact: bool = False
    per: Per = "site"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        return proposed(self.name, self.title, self.lines, group, evidence)

    def lines(self, site: Site) -> dict[str, str] | Refusal:
        if not causal(site):
            return Refusal("its gate is over blocks up to the query's own: it needs a causal mask", site.name)
        length = site.size("k")
        wide = [(block, n) for block, n in self.blocks if not (isinstance(length, int) and block * n >= length)]
        found = {f"{n} blocks of {block}": self.choice(block, n) for block, n in wide}
        return found or Refusal(f"the smallest choice covers all {length} keys", site.name)

    def choice(self, block: int, seen: int) -> str:
        """The clause of the spec."""
        return f"block_topk({block}, {seen})"

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """The group with the selection in the spec of its site."""
        return applied(candidate, group)
