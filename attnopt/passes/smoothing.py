"""Move what is hard to quantise from the inputs of linear layers into their weights: activation smoothing.

    y = x W'   ->   y = (x / s) (W s)'        s_j = max|x_j|^alpha / max|W_j|^(1 - alpha), j an input channel

A few channels of x are far larger than the others and set the step for all; divided by s they are not. The factors are rounded to
powers of two, so that moving them changes no bit of the result, and alpha is the one of a few with the least error predicted from
statistics alone:  E|y - y'|²  =  (d_x² |W s|² + sum_o d_w(o)² sum_j E(x_j / s_j)²) / 12,  d the steps of the two roundings.

Source: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALPHAS = (0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
LARGEST = 30  # exponents beyond this are no smoothing any more, and the product would leave float32
CODES = 255.0  # of an unsigned 8-bit input
HALF_CODES = 127.0  # of a symmetric 8-bit weight
GAIN = 0.8  # a predicted error above this share of the plain one is not worth a changed model


@dataclass(frozen=True)
class Smoothing:
    """alpha, the exponent of two that each input channel is divided by, and the predicted error as a share of the plain one."""

    alpha: float
    exponents: tuple[int, ...]
    error: float

    @property
    def factors(self) -> Tensor:
        """s [in], float32."""
        return factors(self.exponents)


def factors(exponents: Sequence[int]) -> Tensor:
    return torch.ldexp(torch.ones(len(exponents)), torch.tensor(exponents))


def best_smoothing(
    weights: Sequence[Tensor], max_abs: Tensor, mean_square: Tensor, tied: Tensor | None = None
) -> Smoothing | None:
    """The factors for layers that read one value, or None where smoothing is predicted to gain little.

    weights: [out, in] each. max_abs, mean_square: largest magnitude and mean square of each input channel [in].
    tied: a number for each channel, int64 [in]; those of one number get one factor.
    """
    magnitude = torch.cat([w.abs() for w in weights])  # times powers of two, which rounds nothing
    columns, most = torch.stack([w.double().square().sum(0) for w in weights]).sum(0), magnitude.amax(0).double()
    largest, squares = max_abs.double().cpu(), mean_square.double().cpu()
    plain = expected_error(magnitude, columns, largest, squares)
    if not plain > 0:
        return None
    best: Smoothing | None = None
    for alpha in ALPHAS:
        powers = exponents(joined(largest, tied), joined(most, tied), alpha)
        s = torch.ldexp(torch.ones_like(largest), powers)
        share = expected_error(magnitude * s.float(), columns * s.square(), largest / s, squares / s.square()) / plain
        if share < GAIN and (best is None or share < best.error):
            best = Smoothing(alpha, tuple(int(p) for p in powers), share)
    return best


def joined(values: Tensor, tied: Tensor | None) -> Tensor:
    """Of each channel the largest value of all that are tied to it."""
    if tied is None:
        return values
    most = torch.zeros(int(tied.max()) + 1, dtype=values.dtype).scatter_reduce(0, tied, values, "amax", include_self=False)
    return most[tied]


def exponents(largest: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Exponents of two of s, of channels that are never read or have no weight 0; the middle one is 0, so that nothing just grows."""
    known = (largest > 0) & (weight > 0)
    s = torch.where(known, largest.pow(alpha) / weight.clamp(min=1e-30).pow(1 - alpha), torch.ones_like(largest))
    powers = torch.round(torch.log2(s)).to(torch.int64)
    middle = powers[known].median() if bool(known.any()) else torch.tensor(0)
    return torch.where(known, powers - middle, torch.zeros_like(powers)).clamp(-LARGEST, LARGEST)


def rounding_error(weight: Tensor, largest: Tensor, squares: Tensor) -> float:
    """The expected squared error of a row of the output, where inputs [in] and weights [out, in] are rounded to 8 bits."""
    return expected_error(weight.abs(), weight.square().sum(0), largest, squares)


def expected_error(magnitude: Tensor, columns: Tensor, largest: Tensor, squares: Tensor) -> float:
    """The same from magnitudes of the weights [out, in] and their sums of squares by input [in]."""
    step_x = 2.0 * largest.max() / CODES
    steps_w = magnitude.amax(1).double() / HALF_CODES
    return float((step_x.square() * columns.sum() + steps_w.square().sum() * squares.sum()) / 12.0)
