"""Let 64 queries together see the few blocks of keys whose mean their own mean fits best, their own block among them.

    softmax scale(s) causal   ->   softmax scale(s) causal block_topk(64, 8, rows=64, first=1)

As MoBA's gate, of the mean of so many queries in place of each: what they share, a kernel visits whole, and nothing is masked for one
query that another chose. The first block, where sinks are, is always seen. A choice depends on queries up to 63 later than a row's own;
no later key is ever given weight.

Source: the gate of "MoBA: Mixture of Block Attention for Long-Context LLMs", with the probe of a chunk of queries as in "ActQKV".
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.passes.sparsify.moba import Moba


@dataclass(frozen=True)
class BlockTopk(Moba):
    """Let 64 queries together see the few blocks of keys whose mean their own mean fits best, their own block among them.

    blocks: (keys of a block, how many are seen). rows: queries that choose together.
    """

    blocks: tuple[tuple[int, int], ...] = ((64, 8), (64, 4))
    name: str = "block-topk"
    title: str = "MoBA's gate for 64 queries together"
    rows: int = 64

    def choice(self, block: int, seen: int) -> str:
        return f"block_topk({block}, {seen}, rows={self.rows}, first=1)"
