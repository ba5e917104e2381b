"""Smoothing: factors are powers of two, moving them is exact, and they lessen the error that is predicted and the one that is made."""

from __future__ import annotations

import torch

from attnopt.passes.smoothing import ALPHAS, best_smoothing, factors, rounding_error


def outliers(channels=64, rows=256):
    torch.manual_seed(0)
    x = torch.randn(rows, channels)
    x[:, ::16] *= 60.0
    return x, torch.randn(48, channels) / 8


def rounded(x, weight):
    """x W' with both rounded to 8 bits as the kernels round: inputs by one step, weights by one for each output."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    step = (high - low) / 255
    steps = weight.abs().amax(1, keepdim=True) / 127
    return torch.round(x / step) * step @ (torch.round(weight / steps) * steps).T


def test_the_error_falls_as_predicted():
    x, weight = outliers()
    found = best_smoothing([weight], x.abs().amax(0), x.square().mean(0))
    assert found is not None and found.alpha in ALPHAS
    exact = x @ weight.T
    plain = (rounded(x, weight) - exact).square().mean()
    smooth = (rounded(x / found.factors, weight * found.factors) - exact).square().mean()
    assert smooth < 0.3 * plain
    assert 0.5 < (smooth / plain) / found.error < 2.0
    predicted = rounding_error(weight.double(), x.abs().amax(0).double(), x.square().mean(0).double()) * len(x) / x.shape[0]
    assert 0.3 < float((rounded(x, weight) - exact).square().sum(1).mean()) / predicted < 2.0


def test_moving_the_factors_changes_no_bit():
    x, weight = outliers()
    found = best_smoothing([weight[:20], weight[20:]], x.abs().amax(0), x.square().mean(0))
    s = factors(found.exponents)
    assert torch.equal(torch.frexp(s)[0], torch.full_like(s, 0.5))
    assert torch.equal(x / s * s, x)
    assert torch.equal((x / s) * (weight[0] * s), x * weight[0])


def test_even_inputs_and_dead_channels_are_left():
    x, weight = torch.randn(256, 64), torch.randn(48, 64)
    assert best_smoothing([weight], x.abs().amax(0), x.square().mean(0)) is None
    x, weight = outliers()
    x[:, 5] = 0.0
    weight[:, 7] = 0.0
    found = best_smoothing([weight], x.abs().amax(0), x.square().mean(0))
    assert found.exponents[5] == found.exponents[7] == 0
    assert best_smoothing([torch.zeros(4, 64)], x.abs().amax(0), x.square().mean(0)) is None
