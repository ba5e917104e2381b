"""Parts of the keys merge to the whole; what a part drops is what its weights lack, and bounds what it loses."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ir.operands import close

from attnopt.ir.partial import dropped_mass, merged, output_bound
from attnopt.ir.reference import attend


def qkv(seed, length=12):
    made = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(2, 3, length, 4, generator=made, dtype=torch.float64) for _ in range(3))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(1, 11), max_size=3, unique=True), causal=st.booleans())
def test_parts_of_the_keys_merge_to_the_whole(seed, cuts, causal):
    q, k, v = qkv(seed)
    whole = attend("softmax scale(0.5)" + " causal" * causal, q, k, v)
    edges = [0, *sorted(cuts), 12]
    parts = []
    for first, end in itertools.pairwise(edges):
        mask = f"k >= {first} & k < {end}" + " & causal" * causal
        part = attend(f"softmax scale(0.5) {mask} empty(zero)", q, k, v)
        parts.append((part.output, part.lse))
    output, lse = merged(parts)
    close(output, whole.output)
    close(lse, whole.lse)


def test_parts_that_see_nothing_count_for_nothing():
    q, k, v = qkv(0)
    seen = attend("softmax causal", q, k, v)
    nothing = (torch.full_like(seen.output, torch.nan), torch.full_like(seen.lse, -torch.inf))
    output, lse = merged([nothing, (seen.output, seen.lse)])
    close(output, seen.output)
    close(lse, seen.lse)
    output, lse = merged([nothing, nothing])
    assert (output == 0).all() and (lse == -torch.inf).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), window=st.integers(1, 12))
def test_dropped_mass_bounds_the_change(seed, window):
    q, k, v = qkv(seed)
    whole, part = (attend(f"softmax scale(0.5) causal & window({w})", q, k, v) for w in (12, window))
    mass = dropped_mass(part.lse, whole.lse)
    close(mass, (whole.weights * (part.weights == 0)).sum(-1))
    change = (part.output - whole.output).norm(dim=-1)
    assert (change <= output_bound(mass, v) + 1e-9).all()
