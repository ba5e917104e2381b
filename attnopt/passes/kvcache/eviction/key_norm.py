"""Keep the tokens whose keys are short.

    score_j = -|k_j|

Norms are the same before and after the turn of a rotary position. The first two layers keep all, as in the source: there norms say
least about attention. They say nothing where keys are normalised (the norms of such a layer are nearly equal), and it is left whole.
The source begins at prompts of 2,048 tokens (1,000 for plain language modelling); here the room that is asked for decides.

Source: "A simple and effective L2 norm-based strategy for KV cache compression".
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnopt.ir.eviction import Seen
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class KeyNorm:
    """Keep the tokens whose keys are short. whole: the first layers, which keep all."""

    whole: int = 2
    name: str = "key-norm"
    queries: int = 0
    plain: bool = False
    every: int | None = None
    adaptive: bool = False
    floor: float = 1.0

    def protected(self, decoding: bool) -> tuple[int, int]:
        return 0, 0

    def unfit(self, spec: AttentionSpec, layer: int) -> str:
        if layer < self.whole:
            return f"the first {self.whole} layers keep all their tokens"
        normed = spec.qk_norm is not None and spec.qk_norm.word("on") != "q"
        return "its keys are normalised, so that their norms say nothing" if normed else ""

    def clause(self, count: int) -> str:
        return f"keep({count}, by=key_norm)"

    def scores(self, seen: Seen) -> Tensor:
        return -seen.k.float().norm(dim=-1)
