"""GPTQ: exact where nothing is correlated, better than the nearest level where something is, robust where a moment is not full."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.rounding.gptq import Gptq, inverse_factor, reconstruction_error
from attnopt.rounding.grids import Gridding
from attnopt.rounding.weight_format import WeightFormat


def drawn(seed, outputs=24, inputs=64, rank=64):
    """Weights, and the second moment of inputs of this rank; of full rank they also vary on their own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight, x = normal(outputs, inputs), normal(400, rank) @ normal(rank, inputs)
    x = x + 0.1 * normal(400, inputs) if rank == inputs else x
    return weight, x.T @ x / len(x)


@pytest.mark.parametrize("group", [0, 16, 32])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("by_activation", [False, True])
@settings(deadline=None, max_examples=3)
@given(seed=st.integers(0, 1000), bits=st.sampled_from([2, 3, 4]))
def test_it_loses_less_than_the_nearest_levels(group, zeros, by_activation, seed, bits):
    weight, moment = drawn(seed, rank=16)
    format = WeightFormat(bits, group, zeros)
    nearest = Gridding().rounded(weight, format)
    made = Gptq(by_activation=by_activation).rounded(weight, moment, format)
    assert reconstruction_error(weight, made, moment) < reconstruction_error(weight, nearest, moment)


@pytest.mark.parametrize("group", [0, 16])
def test_inputs_without_correlation_get_their_nearest_levels(group):
    weight, _ = drawn(0)
    made = Gptq().rounded(weight, torch.eye(64), WeightFormat(4, group))
    assert torch.equal(made.codes, Gridding().rounded(weight, WeightFormat(4, group)).codes)


@pytest.mark.parametrize(("block", "group"), [(8, 16), (48, 32), (64, 0), (1, 16), (40, 64)])
def test_blocks_change_the_order_of_sums_only(block, group):
    weight, moment = drawn(1)
    one, other = (Gptq(block=b).rounded(weight, moment, WeightFormat(4, group)) for b in (64, block))
    torch.testing.assert_close(one.matrix(), other.matrix(), rtol=1e-6, atol=1e-6)


def test_the_scale_of_the_moment_does_not_matter():
    weight, moment = drawn(2)
    made = [Gptq().rounded(weight, moment * scale, WeightFormat(4, 16)).codes for scale in (1.0, 2.0**20, 2.0**-20)]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_inputs_that_were_never_seen_are_rounded_to_the_nearest():
    weight, moment = drawn(3)
    moment[:, 5] = moment[5] = 0.0
    made = Gptq().rounded(weight, moment, WeightFormat(4))
    steps, column = made.steps[:, 0].double().abs(), weight[:, 5]
    within = column.abs() < 5 * steps
    assert bool(((made.matrix(torch.float64)[:, 5] - column).abs() <= steps * 0.501)[within].all())
    assert torch.isfinite(made.matrix()).all()


def test_a_moment_of_low_rank_is_damped_until_it_can_be_inverted():
    _, moment = drawn(4, rank=3)
    upper = inverse_factor(moment, 0.0)
    assert torch.isfinite(upper).all() and torch.equal(upper, upper.triu())
    _, full = drawn(4)
    torch.testing.assert_close(
        (lambda u: u.T @ u)(inverse_factor(full, 0.0)) @ full, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-6
    )
    with pytest.raises(ValueError, match="not finite"):
        inverse_factor(torch.full((4, 4), torch.nan, dtype=torch.float64), 0.01)


def test_layers_that_memory_does_not_hold_are_refused():
    refusal = Gptq().refusal(14336, 28672)
    assert refusal.reason == "GPTQ of 14336 x 28672 weights would take 27.6 GiB, more than 8.0"
    assert Gptq().refusal(4096, 4096) is None
