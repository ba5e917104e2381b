"""Keep the first tokens and the newest ones.

    score_j = place of j          the first `sinks` tokens are protected

While decoding a token leaves for each that comes. With room for C tokens a query sees what the mask
`causal & (window(C - sinks + 1) | global(sinks))` shows of the full cache: itself, the sinks, and the C - sinks tokens before it.

Source: StreamingLLM ("Efficient Streaming Language Models with Attention Sinks"). There positions are counted within the cache; here
tokens keep the positions that they came with, as in the other policies.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnopt.ir.eviction import Seen
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class SinksWindow:
    """Keep the first tokens and the newest ones. sinks: how many first ones."""

    sinks: int = 4
    name: str = "sinks-window"
    queries: int = 0
    plain: bool = False
    every: int | None = 1
    adaptive: bool = False
    floor: float = 1.0

    def protected(self, decoding: bool) -> tuple[int, int]:
        return self.sinks, 1

    def unfit(self, spec: AttentionSpec, layer: int) -> str:
        return ""

    def clause(self, count: int) -> str:
        return f"keep(0, sinks={self.sinks}, recent={max(0, count - self.sinks)})"

    def scores(self, seen: Seen) -> Tensor:
        return seen.places.double()
