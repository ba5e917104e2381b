"""Rows of a cache in codes: errors within half a step at every width and group, less loss with more bits, and the nearest that fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.ir.packing import Packed, unpack
from attnopt.ir.storage import hadamard
from attnopt.passes.edits.caches.rows import Rows

WIDTH = 32
seeds = st.integers(0, 10_000)
forms = st.builds(Rows, st.sampled_from([8, 4, 2, 1]), st.sampled_from([0, 8, 16, 32, 64]), st.sampled_from(["fp32", "fp16"]))


def sample(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, 5, WIDTH, generator=generator) * torch.randn(1, 1, 1, WIDTH, generator=generator).exp()


def read(form, x):
    codes, scales, zeros = form.packed(x)
    return unpack(Packed(codes, scales, zeros), form.clause, "k", torch.float32), scales.float()


@settings(deadline=None, max_examples=40)
@given(seeds, forms)
def test_no_error_exceeds_half_a_step(seed, form):
    """And what a zero point that is rounded to a whole number of steps shifts the range by: another half. Scales in half round too."""
    x = sample(seed)
    back, scales = read(form, x)
    steps = scales.repeat_interleave(WIDTH // scales.shape[-1], -1)
    slack = 1e-3 * x.abs().amax() if form.scales == "fp16" else 1e-5
    assert bool(((back - x).abs() <= steps + slack).all())
    assert form.bytes_per_row(WIDTH) == sum(p.shape[-1] * p.element_size() for p in form.packed(x))


@settings(deadline=None, max_examples=25)
@given(seeds, st.sampled_from([0, 8, 16]), st.booleans())
def test_loss_falls_with_bits(seed, group, turned):
    x = sample(seed)
    basis = hadamard(WIDTH).float() if turned else torch.eye(WIDTH)
    losses = [float((read(Rows(bits, group, turned=turned), x)[0] - x @ basis).square().sum()) for bits in (2, 4, 8)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("form", "width", "says"),
    [
        (Rows(4, 12), 32, "groups of 12 channels do not divide rows of 32; the nearest that do are [8, 16]"),
        (Rows(4), 7, "rows of 7 channels"),
        (Rows(2, turned=True), 24, "a Hadamard basis needs rows of a power of two, and these have 24 channels"),
        (Rows(8), 7, ""),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest(form, width, says):
    said = form.refusal(width)
    assert said.startswith(says) and bool(said) == bool(says)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named(bad):
    x = sample(0)
    x[0, 1, 3, 7] = bad
    with pytest.raises(ValueError, match="in sequence 0, head 1, token 3, channel 7"):
        Rows(4).packed(x)


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from([8, 4, 2]))
def test_a_folded_basis_packs_what_an_online_one_does(seed, bits):
    """`packed` takes rows as they were: what the weights make of them afterwards is already turned."""
    x = sample(seed)
    plain, folded = (Rows(bits, turned=True, folded=folded) for folded in (False, True))
    for one, other in zip(plain.packed(x), folded.packed(x), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(plain.exact(x), x)
    torch.testing.assert_close(folded.exact(x), x @ hadamard(WIDTH).float())
