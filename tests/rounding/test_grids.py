"""Grids: error bounds, clips that only help, more bits that lose less, refusals of what cannot be rounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.rounding import grids
from attnopt.rounding.grids import GAUSSIAN, Gridding
from attnopt.rounding.rounded_weight import RoundedWeight, grouped, unfit
from attnopt.rounding.weight_format import WeightFormat

KINDS = ("extremes", "squares")
seeds = st.integers(0, 10_000)
formats = st.builds(WeightFormat, st.integers(1, 8), st.sampled_from([0, 1, 4, 16, 32, 64]), st.booleans())


def weights(seed, outputs=6, inputs=64):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(outputs, 1, generator=generator).exp()
    return torch.randn(outputs, inputs, generator=generator) * spread + 0.3 * torch.randn(outputs, 1, generator=generator)


def squares(weight, made):
    return float((weight - made.matrix()).square().sum())


@settings(deadline=None, max_examples=25)
@given(seeds, formats)
def test_without_clips_no_error_exceeds_the_step(seed, format):
    """Half a step between levels; a symmetric grid may cut half a step off the largest, one of two levels the whole side of a sign."""
    weight = weights(seed)
    made = Gridding("extremes").rounded(weight, format)
    away = grouped((weight - made.matrix()).abs(), format)
    assert bool((away <= made.steps.abs()[..., None] * (1.0 if format.zeros or format.bits == 1 else 0.5) * 1.001 + 1e-6).all())


@settings(deadline=None, max_examples=25)
@given(seeds, formats)
def test_clips_lose_no_more_than_extremes(seed, format):
    weight = weights(seed)
    assert (
        squares(weight, Gridding("squares").rounded(weight, format))
        <= squares(weight, Gridding("extremes").rounded(weight, format)) + 1e-9
    )


@settings(deadline=None, max_examples=25)
@given(seeds, st.sampled_from([0, 16, 32]), st.booleans(), st.sampled_from(["squares", "gaussian"]))
def test_loss_falls_with_bits(seed, group, zeros, kind):
    weight = weights(seed) - (weights(seed).mean(1, keepdim=True) if kind == "gaussian" else 0.0)
    losses = [squares(weight, Gridding(kind).rounded(weight, WeightFormat(bits, group, zeros))) for bits in (2, 3, 4, 6, 8)]
    assert losses == sorted(losses, reverse=True)


@settings(deadline=None, max_examples=25)
@given(seeds, formats)
def test_arrays_hold_all_of_it(seed, format):
    made = Gridding("squares").rounded(weights(seed), format)
    again = RoundedWeight.from_arrays(format, made.arrays(), made.shape[1])
    assert torch.equal(again.matrix(), made.matrix())
    held = sum(x.numel() * x.element_size() for x in made.arrays().values() if x.ndim)
    whole = made.zeros.numel() * (4 - format.bits / 8) if format.zeros else 0.0  # zero points are numbers here, codes in a file
    assert abs(held - whole - made.bytes()) <= 1


def test_importance_moves_the_clip():
    """An outlier that is never read is cut off, and the others get its room."""
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    weight[0, 5] = 40.0
    importance = torch.ones(64)
    importance[5] = 0.0
    plain, told = (Gridding().rounded(weight, WeightFormat(4), given) for given in (None, importance))
    away = [((weight - m.matrix()).square() * importance).sum() for m in (plain, told)]
    assert away[1] < away[0] / 2


@pytest.mark.parametrize("bits", sorted(GAUSSIAN))
def test_the_gaussian_clip_is_the_best_one(bits):
    """Of a unit Gaussian, on levels in the middle of their bins: ten per cent to either side lose more."""
    unit = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)

    def error(clip):
        step = 2 * clip / (2**bits - 1)
        codes = torch.round(unit / step + (2 ** (bits - 1) - 0.5)).clamp(0, 2**bits - 1)
        return float(((codes - (2 ** (bits - 1) - 0.5)) * step - unit).square().mean())

    best = error(GAUSSIAN[bits])
    assert best < error(0.9 * GAUSSIAN[bits]) and best < error(1.1 * GAUSSIAN[bits])


def test_gaussian_levels_are_distinct_and_between_codes():
    made = Gridding("gaussian").rounded(torch.linspace(-2, 2, 512)[None] ** 3, WeightFormat(3))
    assert made.zeros == 3.5
    assert len(made.matrix().unique()) == 8


@pytest.mark.parametrize(("bad", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_numbers_that_are_none_are_named(bad, word):
    weight = weights(0)
    weight[2, 7] = bad
    refusal = unfit(weight, WeightFormat(4, 32), "layers.0.q_proj")
    assert str(refusal) == f"1 weights are {word}, the first at [2, 7] (at layers.0.q_proj)"
    assert unfit(weights(0), WeightFormat(4, 32)) is None
    assert str(unfit(weights(0), WeightFormat(4, 48), "q")) == "groups of 48 do not divide rows of 64 inputs; 64 do (at q)"


def test_zeros_stay_zeros():
    weight = torch.zeros(3, 32)
    for kind in KINDS:
        for zeros in (False, True):
            assert torch.equal(Gridding(kind).rounded(weight, WeightFormat(4, 16, zeros)).matrix(), weight)


@pytest.mark.parametrize("format", [WeightFormat(8, 32, False), WeightFormat(3, 0, True)], ids=str)
def test_rows_are_searched_apart_with_the_same_result(format, monkeypatch):
    weight, counts = weights(0, outputs=13), torch.rand(64, generator=torch.Generator().manual_seed(1))
    whole = Gridding().grid(weight, format, counts)
    monkeypatch.setattr(grids, "AT_ONCE", 3 * 64)
    apart = Gridding().grid(weight, format, counts)
    torch.testing.assert_close(apart, whole, rtol=0, atol=0)
