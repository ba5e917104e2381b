"""Statistics that grow row by row equal those of all rows at once, and go on from a saved state bit by bit."""

from __future__ import annotations

import pytest
import torch

from attnopt.analysis.running import RunningChannels, RunningMoment, nested, restore


def rows(count=101, width=5):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1)) * 3 + torch.tensor([0.0, 1.0, -50.0, 1e4, 0.1])


def fed(running, x, sizes):
    for part in x.split(list(sizes)):
        running.add(part)
    return running


@pytest.mark.parametrize("sizes", [(101,), (1, 99, 1), (50, 0, 51), (1,) * 101])
def test_channels_equal_those_of_all_rows(sizes):
    x = rows()
    found, exact = fed(RunningChannels(5), x, sizes).value(), x.double()
    assert found.rows == 101
    torch.testing.assert_close(found.mean, exact.mean(0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.variance, exact.var(0, correction=0), rtol=1e-10, atol=0.0)  # beside a mean of 10,000
    assert torch.equal(found.low, exact.amin(0))
    assert torch.equal(found.high, exact.amax(0))
    assert torch.equal(found.max_abs, exact.abs().amax(0))
    torch.testing.assert_close(found.mean_square, exact.square().mean(0), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("sizes", [(101,), (1, 99, 1), (50, 0, 51)])
def test_the_second_moment_equals_that_of_all_rows(sizes):
    x = rows()
    torch.testing.assert_close(fed(RunningMoment(5), x, sizes).value(), x.double().T @ x.double() / 101, rtol=1e-13, atol=1e-12)


def test_whole_numbers_are_exact():
    """Sums of whole numbers round nowhere: streaming and batch agree in every bit."""
    x = torch.randint(-9, 9, (64, 5), generator=torch.Generator().manual_seed(2)).float()
    streamed, once = (fed(RunningMoment(5), x, sizes).value() for sizes in ((1,) * 64, (64,)))
    assert torch.equal(streamed, once)
    assert torch.equal(once, x.double().T @ x.double() / 64)


def test_no_rows_say_nothing():
    found = RunningChannels(3).value()
    assert found.rows == 0
    assert torch.equal(found.low, torch.full((3,), torch.inf, dtype=torch.float64))
    assert torch.equal(RunningMoment(2).value(), torch.zeros(2, 2, dtype=torch.float64))


def test_a_restored_state_goes_on_bit_by_bit():
    x = rows()
    whole = {"a": fed(RunningChannels(5), x, (40, 61)), "b": fed(RunningMoment(5), x, (40, 61))}
    half = {"a": fed(RunningChannels(5), x[:40], (40,)), "b": fed(RunningMoment(5), x[:40], (40,))}
    saved = {name: tensor.clone() for name, tensor in nested(half).items()}
    resumed = {"a": RunningChannels(5), "b": RunningMoment(5)}
    restore(resumed, saved)
    for part in resumed.values():
        part.add(x[40:])
    assert all(torch.equal(tensor, nested(resumed)[name]) for name, tensor in nested(whole).items())
