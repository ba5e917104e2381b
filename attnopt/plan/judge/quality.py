"""How much a rewrite loses: in the natural metric of the model's output, or in the user's own score.

logits      mean KL(original || result) in nats          embeddings   mean 1 - cosine        otherwise   relative error
quality     what a score of the user's falls by, original less result

A loss is a mean over samples (independent sequences, see `analysis.calibration`); its bound is in `bound`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnopt.plan.judge.bound import upper_bound

ROWS = 32  # of logits at a time: what is made of them stays in the cache, which is three times as fast
Score = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Any]


@dataclass(frozen=True)
class Metric:
    """A loss between the original's output and the result's, zero where they are equal."""

    name: str
    loss: Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Loss:
    """mean: over samples, in `metric`. upper: its one-sided 95 % bootstrap bound. values: the loss of each sample, in order."""

    metric: str
    mean: float
    upper: float
    samples: int
    values: tuple[float, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, metric: str, values: Sequence[float], seed: int = 0) -> Loss:
        """From the loss of each sample. A loss that is no number (the result holds NaN) counts as infinite."""
        known = tuple(float("inf") if v != v else float(v) for v in values)
        mean = sum(known) / len(known) if known else float("inf")
        return cls(metric, mean, upper_bound(known, seed=seed), len(known), known)

    def __str__(self) -> str:
        return f"{self.metric} {self.mean:.3g} (at most {self.upper:.3g} with 95 % confidence, {self.samples} samples)"


def kl(before: Tensor, after: Tensor) -> float:
    """Mean KL divergence in nats over all rows; [..., classes] logits. A class that the original rules out adds nothing."""
    rows = (t.reshape(-1, t.shape[-1]).split(ROWS) for t in (before, after))
    return float(torch.cat([kl_of_rows(p, q) for p, q in zip(*rows, strict=True)]).mean())


def kl_of_rows(before: Tensor, after: Tensor) -> Tensor:
    """Of each row; [rows, classes] -> [rows], float64."""
    p, q = (torch.log_softmax(t.double(), -1) for t in (before, after))
    return (p.exp() * (p - q)).masked_fill(p == -torch.inf, 0.0).sum(-1)


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
