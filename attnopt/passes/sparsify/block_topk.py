"""Let 64 queries together see the few blocks of keys whose mean their own mean fits best, their own block among them.

    softmax scale(s) causal   ->   softmax scale(s) causal block_topk(64, 8, rows=64, first=1)

As MoBA's gate, of the mean of so many queries in place of each: what they share, a kernel visits whole, and nothing is masked for one
query that another chose. The first block, where sinks are, is always seen. A choice depends on queries up to 63 later than a row's own;
no later key is ever given weight.

Source: the gate of "MoBA: Mixture of Block Attention for Long-Context LLMs", with the probe of a chunk of queries as in "ActQKV".
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.sparsity import applied, causal, proposed


@dataclass(frozen=True)
class BlockTopk:
    """Let 64 queries together see the few blocks of keys whose mean their own mean fits best, their own block among them.

    blocks: (keys of a block, how many are seen). rows: queries that choose together.
    """

    blocks: tuple[tuple[int, int], ...] = ((64, 8), (64, 4))
    rows: int = 64
    name: str = "block-topk"
    exact: bool = False
    per: Per = "site"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        return proposed(self.name, "MoBA", self.lines, group, evidence)

    def lines(self, site: Site) -> dict[str, str] | Refusal:
        if not causal(site):
            return Refusal("its gate is over blocks up to the queries' own: it needs a causal mask", site.name)
        length = site.size("k")
        wide = [(block, n) for block, n in self.blocks if not (isinstance(length, int) and block * n >= length)]
        found = {f"{n} blocks of {block}": f"block_topk({block}, {n}, rows={self.rows}, first=1)" for block, n in wide}
        return found or Refusal(f"the smallest choice covers all {length} keys", site.name)

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """The group with the selection in the spec of its site."""
        return applied(candidate, group)
