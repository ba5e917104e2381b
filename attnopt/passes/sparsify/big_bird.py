"""Let each block of queries see its neighbours, the first and the last block, and a few blocks by chance.

    softmax scale(s)          ->   softmax scale(s) near_blocks(64, 1) | random_blocks(64, 1, 3, 812) | … the first and the last block
    softmax scale(s) causal   ->   softmax scale(s) causal & (near_blocks(64, 2) | causal_random_blocks(64, 2, 3, 812) | global(64))

By the first and the last block, which see all and are seen by all, any two tokens are two steps apart. Which blocks are seen by chance is
fixed by the head, the block, and a seed for each attention; the blocks that are neither near nor global are cut into as many parts as are
drawn, and one of each part is taken, so that none is drawn twice (the source draws from all of them alike). Under a causal mask, all lie
before the query, the window is as wide to one side, and there is no last block: the sequence may go on. The source trains with it.

Source: "Big Bird: Transformers for Longer Sequences".
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from attnopt.ir.expr import RANDOM_SEEDS
from attnopt.ir.site import Refusal, Site
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.sparsity import applied, causal, proposed


@dataclass(frozen=True)
class BigBird:
    """Let each block of queries see its neighbours, the first and the last block, and a few blocks by chance.

    blocks: keys of a block. window: blocks of the window, the query's own among them. chance: how many are drawn.
    """

    blocks: tuple[int, ...] = (64,)
    window: int = 3
    chance: int = 3
    name: str = "big-bird"
    exact: bool = False
    per: Per = "site"

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        return proposed(self.name, "Big Bird", self.lines, group, evidence)

    def lines(self, site: Site) -> dict[str, str] | Refusal:
        back, length = causal(site), site.size("k")
        if not back and site.spec.mask is not None:
            return Refusal(f"under the mask '{site.spec.mask}' a block may see nobody", site.name)
        seen = self.window + self.chance + (1 if back else 2)
        wide = [n for n in self.blocks if not (isinstance(length, int) and seen * n >= length)]
        seed = zlib.crc32(site.name.encode()) % RANDOM_SEEDS
        found = {f"{self.chance} of the blocks of {n} by chance": self.line(n, seed, back=back) for n in wide}
        return found or Refusal(f"the smallest pattern covers all {length} keys", site.name)

    def line(self, n: int, seed: int, *, back: bool) -> str:
        if back:
            near = self.window - 1
            return f"(near_blocks({n}, {near}) | causal_random_blocks({n}, {near}, {self.chance}, {seed}) | global({n}))"
        near, last = self.window // 2, f"(size(k) - 1) // {n}"
        ends = f"global({n}) | global_query({n}) | k // {n} == {last} | q // {n} == {last}"
        return f"(near_blocks({n}, {near}) | random_blocks({n}, {near}, {self.chance}, {seed}) | {ends})"

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """The group with the new mask in the spec of its site."""
        return applied(candidate, group)
