"""Keep what the last queries of the prompt look at, and their neighbours.

    A = softmax(q[-w:] k' scale + causal)      s_j = pool(sum_t A_tj) for j before the window      mean over the heads that share keys

The window of the last w tokens is protected. Pooling runs over neighbours in the cache, so that a token that is looked at keeps those
around it. Tokens that come while decoding are appended and not evicted (`every=None`), as in the source; asked to evict them, the last
w queries of the moment are the window. The group mean keeps one cache a key head: the source repeats keys to all query heads instead.

Source: "SnapKV: LLM Knows What You are Looking for Before Generation".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from attnopt.errors import OutOfRange
from attnopt.ir.eviction import Seen
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class Snapkv:
    """Keep what the last queries of the prompt look at. window: of so many tokens. kernel: neighbours that are pooled, odd."""

    window: int = 32
    kernel: int = 5
    pooling: Literal["mean", "max"] = "mean"
    name: str = "snapkv"
    plain: bool = False
    every: int | None = None
    adaptive: bool = False
    floor: float = 1.0

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise OutOfRange("window of at least 1, kernel odd", f"window={self.window}, kernel={self.kernel}")

    @property
    def queries(self) -> int:
        return self.window

    def protected(self, decoding: bool) -> tuple[int, int]:
        return 0, self.window

    def unfit(self, spec: AttentionSpec, layer: int) -> str:
        return (
            "its softmax has a sink logit, which the weights of a window are not computed with" if spec.sink is not None else ""
        )

    def clause(self, count: int) -> str:
        words = f"keep({max(0, count - self.window)}, by=snap, pool={self.kernel}, recent={self.window}"
        return f"{words})" if self.pooling == "mean" else f"{words}, pooling=max)"

    def scores(self, seen: Seen) -> Tensor:
        near = seen.newest(self.window).repeat_interleave(seen.repeats, 1)
        paid = last(seen, self.window).weights().sum(2).masked_fill(near, 0.0)
        pool = F.avg_pool1d if self.pooling == "mean" else F.max_pool1d
        return seen.by_group(pool(paid, self.kernel, stride=1, padding=self.kernel // 2))


def last(seen: Seen, count: int) -> Seen:
    """The same with no more than the last `count` queries."""
    assert seen.q is not None and seen.q_places is not None
    return replace(seen, q=seen.q[:, :, -count:], q_places=seen.q_places[-count:])
