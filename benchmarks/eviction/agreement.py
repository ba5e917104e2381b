"""How well a policy's order agrees with what later queries do: Spearman's correlation of its scores with the attention that they pay.

Behind a prompt of 512 tokens every policy scores the same cache; the queries of the next 128 tokens pay attention to it. By head and
document, without the first four tokens and the last 16, which policies protect: one number each, and their mean over layers and heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import attnopt
from attnopt.hosts.eviction.patches import watched
from attnopt.ir.eviction import Policy, Seen
from attnopt.passes.kvcache.eviction import ExpectedAttention
from eviction.subjects import Subject

FIRST, LAST = 4, 16


@dataclass(frozen=True)
class Watching(ExpectedAttention):
    """Remembers what it is shown."""

    seen: list[Seen] = field(default_factory=list, compare=False)

    def scores(self, seen: Seen) -> Tensor:
        self.seen.append(seen)
        return super().scores(seen)


class Queries:
    """The queries of every layer in one forward pass, [B, H, L, D]."""

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def attend(self, function: Any, module: nn.Module, q: Tensor, *rest: Any, **given: Any) -> Any:
        self.found[int(module.layer_idx)] = q  # type: ignore[arg-type]
        return function(module, q, *rest, **given)


@torch.no_grad()
def agreements(subject: Subject, policies: dict[str, Policy], documents: int) -> dict[str, Tensor]:
    """By policy, one number for each document: the mean over layers and key heads."""
    tokens = subject.tokens[:documents]
    watching, later = Watching(), Queries()
    with attnopt.cache(watching, keep=1.0, every=None):
        subject.model(tokens[:, : subject.prompt])
    with watched(later):
        subject.model(tokens, use_cache=False)
    found: dict[str, list[list[float]]] = {name: [[] for _ in range(documents)] for name in policies}
    for seen in watching.seen:
        q = later.found[seen.layer][:, :, subject.prompt :]
        k = seen.k.repeat_interleave(seen.repeats, 1)
        paid = seen.by_group(torch.softmax(q @ k.mT * (seen.spec.scale or 1.0), -1).mean(2))[..., FIRST:-LAST]
        for name, policy in policies.items():
            scores = policy.scores(seen)[..., FIRST:-LAST]
            for document in range(documents):
                for head in range(paid.shape[1]):
                    found[name][document].append(float(spearmanr(scores[document, head], paid[document, head]).statistic))
    return {name: torch.tensor([sum(x) / len(x) for x in rows], dtype=torch.float64) for name, rows in found.items()}
