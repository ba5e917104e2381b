"""Losses against values worked out by hand, and which loss is natural for which output."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from attnopt.plan.judge.quality import METRICS, Loss, natural_metric

LOG3 = math.log(3.0)


@pytest.mark.parametrize(
    ("metric", "before", "after", "loss"),
    [
        # (1/2, 1/2) against (3/4, 1/4): ln(2/3)/2 + ln(2)/2; a shift of all logits changes nothing.
        ("kl", [[0.0, 0.0]], [[LOG3, 0.0]], math.log(4 / 3) / 2),
        ("kl", [[LOG3, 0.0]], [[0.0, 0.0]], 0.75 * math.log(1.5) - 0.25 * math.log(2.0)),
        ("kl", [[0.0, 0.0], [1.0, 2.0]], [[LOG3 + 5.0, 5.0], [1.0, 2.0]], math.log(4 / 3) / 4),
        ("kl", [[7.0, 7.0]], [[9.0, 9.0]], 0.0),
        ("kl", [[7.0, 7.0, -math.inf]], [[9.0, 9.0, -math.inf]], 0.0),  # a class that the model rules out
        ("cosine", [[1.0, 0.0]], [[3.0, 3.0]], 1.0 - math.sqrt(0.5)),
        ("cosine", [[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [0.0, 5.0]], 0.5),
        ("cosine", [[1.0, 0.0]], [[-1.0, 0.0]], 2.0),
        ("relative", [[3.0, 4.0]], [[3.0, 9.0]], 1.0),
        ("relative", [[3.0, 4.0]], [[3.0, 4.0]], 0.0),
    ],
)
def test_losses(metric, before, after, loss):
    assert METRICS[metric].loss(torch.tensor(before), torch.tensor(after)) == pytest.approx(loss, abs=1e-7)


@pytest.mark.parametrize(
    ("name", "output", "metric"),
    [
        ("logits", torch.randn(2, 5), "kl"),
        ("start_logits", torch.randn(2, 5), "kl"),
        ("last_hidden_state", torch.randn(2, 5, 8), "cosine"),
        ("sentence_embedding", torch.randn(2, 8), "cosine"),
        ("output", normalize(torch.randn(4, 8), dim=-1), "cosine"),
        ("output", torch.randn(4, 8), "relative"),
        ("output", normalize(torch.randn(2, 4, 8), dim=-1), "relative"),
        ("", torch.randn(3), "relative"),
    ],
)
def test_the_natural_metric(name, output, metric):
    assert natural_metric(name, output) is METRICS[metric]


def test_a_loss_from_its_samples():
    loss = Loss.of("mean KL", [0.1, 0.3])
    assert (loss.mean, loss.samples, loss.values) == (pytest.approx(0.2), 2, (0.1, 0.3))
    assert loss.upper > loss.mean
    assert str(Loss.of("mean KL", [0.25] * 4)) == "mean KL 0.25 (at most 0.25 with 95 % confidence, 4 samples)"
    assert Loss.of("mean KL", [0.1, math.nan]).mean == math.inf
    assert Loss.of("mean KL", []).upper == math.inf
