"""Keep the tokens whose keys lie along the main direction of their head's queries, found once from data.

    Q_h [n, D] queries turned to their positions      v_h = first right singular vector of Q_h, so that most queries lie along it
    v_g = mean of v_h over the query heads that share keys      s_j = k_j . v_g

At run time it is one product for each key, and no query is read. `energy` of a head is the share of its queries' square norms that
lies along v_h: where it is low, a single direction says little. While decoding the newest 64 tokens are protected.

Source: "Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression" (there 20 sequences of 2,048 tokens, 3,000 queries a head).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnopt.errors import InputMismatch
from attnopt.ir.eviction import Seen
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class QFilters:
    """Keep the tokens whose keys lie along the main direction of their head's queries. filters: by layer, [G, D]; see `filters_of`.

    energy: by layer, of each query head, what the filter explains of its queries. recent: newest tokens protected while decoding.
    """

    filters: Mapping[int, Tensor] = field(default_factory=dict, compare=False, repr=False)
    energy: Mapping[int, Tensor] = field(default_factory=dict, compare=False, repr=False)
    recent: int = 64
    name: str = "q-filters"
    queries: int = 0
    plain: bool = False
    every: int | None = None
    adaptive: bool = False
    floor: float = 1.0

    def protected(self, decoding: bool) -> tuple[int, int]:
        return 0, self.recent if decoding else 0

    def unfit(self, spec: AttentionSpec, layer: int) -> str:
        if not self.filters:
            raise InputMismatch(
                "q-filters needs directions of queries, which come from data",
                next_move="Make them once: policy = attnopt.query_filters(model, batches), then attnopt.cache(policy, keep=…).",
            )
        return "" if layer in self.filters else "no filter was made for it"

    def clause(self, count: int) -> str:
        return f"keep({count}, by=filter, filter=filters)"

    def scores(self, seen: Seen) -> Tensor:
        direction = self.filters[seen.layer].to(seen.k.device, torch.float32)
        if direction.shape != (seen.k.shape[1], seen.k.shape[3]):
            raise InputMismatch(
                f"filters of shape {list(direction.shape)} do not fit {seen.k.shape[1]} key heads of {seen.k.shape[3]} channels",
                where=f"layer {seen.layer}",
                next_move="Make them with the model that they are used in.",
            )
        return (seen.k.float() @ direction[:, :, None]).squeeze(-1)


def filters_of(queries: Tensor, key_heads: int) -> tuple[Tensor, Tensor]:
    """Directions of key heads [G, D] and energies of query heads [H], from queries [H, n, D] turned to their positions.

    A direction is oriented so that at least half of its queries have a positive product with it.
    """
    q = queries.double()
    _, values, rows = torch.linalg.svd(q, full_matrices=False)
    first = rows[:, 0]  # [H, D]
    along = ((q @ first[:, :, None]).squeeze(-1) > 0).double().mean(-1)
    first = torch.where(along[:, None] < 0.5, -first, first)
    square = values.square()
    return first.unflatten(0, (key_heads, -1)).mean(1).float(), (square[:, 0] / square.sum(-1).clamp(min=1e-30)).float()
