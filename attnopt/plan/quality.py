"""How much a rewrite loses, in the natural metric of the model's output.

logits      mean KL(original || result) in nats          embeddings   mean 1 - cosine        otherwise   relative error
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """A loss between the original's output and the result's, zero where they are equal."""

    name: str
    loss: Callable[[Tensor, Tensor], float]


def kl(before: Tensor, after: Tensor) -> float:
    """Mean KL divergence in nats over all rows; [..., classes] logits."""
    p, q = (torch.log_softmax(t.double(), -1).reshape(-1, t.shape[-1]) for t in (before, after))
    return float((p.exp() * (p - q)).sum(-1).mean())


def cosine(before: Tensor, after: Tensor) -> float:
    """Mean 1 - cosine over all rows; [..., width] embeddings."""
    a, b = (t.double().reshape(-1, t.shape[-1]) for t in (before, after))
    return float((1.0 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).mean())


def relative(before: Tensor, after: Tensor) -> float:
    """||before - after|| / ||before||."""
    return float((before.double() - after.double()).norm() / before.double().norm().clamp(min=1e-30))


METRICS = {
    name: Metric(label, f)
    for name, label, f in (("kl", "mean KL", kl), ("cosine", "mean 1 - cosine", cosine), ("relative", "relative error", relative))
}
EMBEDDING_WORDS = ("embed", "hidden", "pool", "feature", "sentence")


def natural_metric(name: str, output: Tensor) -> Metric:
    """By the output's name, else by its shape: [batch, width] rows of length one are embeddings."""
    lowered = name.lower()
    if "logit" in lowered or lowered in ("scores", "prediction"):
        return METRICS["kl"]
    if any(word in lowered for word in EMBEDDING_WORDS):
        return METRICS["cosine"]
    if output.ndim == 2 and torch.allclose(output.float().norm(dim=-1), torch.ones(output.shape[0]), atol=1e-3):
        return METRICS["cosine"]
    return METRICS["relative"]


def measured_loss(metric: Metric, before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]) -> float:
    """Mean over batches of the metric on the first floating output."""
    losses = [metric.loss(first_floating(a), first_floating(b)) for a, b in zip(before, after, strict=True)]
    return sum(losses) / len(losses)


def first_floating(outputs: Sequence[Tensor]) -> Tensor:
    return next(t for t in outputs if t.is_floating_point())
