"""Keep the tokens that queries to come are expected to look at.

    q ~ N(mu, Sigma) per query head, before it is turned       mu <- R mu, Sigma <- R Sigma R', R the mean of the next turns
    z_j = scale mu'k_j + scale^2 / 2 k_j'Sigma k_j      p = softmax_j(z)      s_j = (mean over the heads that share keys of p_j + eps) |v_j|

exp(z_j) is the mean of exp(scale q'k_j) for such queries. R is the mean rotation of the next `future` positions; where nothing turns
queries it is one. The first `sinks` tokens are protected, and neither they nor their queries count in mu, Sigma and the softmax. While
decoding, every 512 tokens, the last 256 queries stand for those to come. `adaptive`: heads share the room of their layer by score, each
with at least a fifth of its own; the source then takes eps = 0.01.

Source: "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.eviction import Seen
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class ExpectedAttention:
    """Keep the tokens that queries to come are expected to look at.

    future: positions whose mean turn is taken. covariance: whether Sigma counts, else mu alone. values: whether |v_j| does. eps: see above.
    queries: how many last ones are remembered while decoding. floor: of an equal share, what each head has when `adaptive`.
    """

    future: int = 512
    sinks: int = 4
    eps: float = 0.0
    covariance: bool = True
    values: bool = True
    name: str = "expected-attention"
    queries: int = 256
    plain: bool = True
    every: int | None = 512
    adaptive: bool = False
    floor: float = 0.2

    def protected(self, decoding: bool) -> tuple[int, int]:
        return self.sinks, 0

    def unfit(self, spec: AttentionSpec, layer: int) -> str:
        return ""

    def clause(self, count: int) -> str:
        covariance = ", covariance=covariance" if self.covariance else ""
        return f"keep({max(0, count - self.sinks)}, by=expected, mean=mean{covariance}, sinks={self.sinks})"

    def scores(self, seen: Seen) -> Tensor:
        mean, covariance = self.statistics(seen)
        scale = 1.0 if seen.spec.scale is None else seen.spec.scale
        k = seen.k.float().repeat_interleave(seen.repeats, 1)
        z = scale * (k @ mean[..., None]).squeeze(-1)
        if covariance is not None:
            z = z + scale**2 / 2 * ((k @ covariance) * k).sum(-1)
        counted = (seen.held & ~seen.first(self.sinks)).repeat_interleave(seen.repeats, 1)
        # In double: where z is spread wide, most chances are less than the least float32, and zeros have no order.
        chance = torch.softmax(z.double().masked_fill(~counted, -torch.inf), -1).nan_to_num(0.0)
        found = seen.by_group(chance) + self.eps
        return found * seen.v.double().norm(dim=-1) if self.values else found

    def statistics(self, seen: Seen) -> tuple[Tensor, Tensor | None]:
        """mu [B, H, D] and Sigma [B, H, D, D] of the next queries, turned; of no query at all they are zero."""
        assert seen.plain is not None and seen.q_places is not None
        q = seen.plain.float()
        counted = (seen.q_places >= seen.start[:, None] + self.sinks)[:, None, :, None].to(q)  # [B, 1, W, 1]
        number = counted.sum(2).clamp(min=1)
        mean = (q * counted).sum(2) / number
        covariance = None
        if self.covariance:
            away = (q - mean[:, :, None]) * counted
            covariance = away.mT @ away / number[..., None]
        if seen.future is not None:
            turn = seen.future(self.future).float()  # [B|1, 1, D, D]
            mean = (turn @ mean[..., None]).squeeze(-1)
            covariance = None if covariance is None else turn @ covariance @ turn.mT
        return mean, covariance
