"""Bounds of pages that grow with a cache are those of all its keys, whatever happens to it."""

from __future__ import annotations

import pytest
import torch

from attnopt.hosts.eviction.bounds import Bounds
from attnopt.selectors.pages import state_of


def keys(length=45, batch=2):
    return torch.randn(batch, 2, length, 8, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


def require_right(bounds, k):
    expected, found = state_of(k, 4), bounds.state
    assert found.length == k.shape[2]
    assert torch.equal(found.low, expected.low) and torch.equal(found.high, expected.high)


@pytest.mark.parametrize("steps", [(45,), (1,) * 45, (8, 5, 1, 1, 30), (3, 1, 1, 4)])
def test_they_grow_with_the_cache(steps):
    k, bounds, length = keys(), Bounds(4), 0
    for step in steps:
        length += step
        bounds = bounds.grown(k[:, :, :length])
        require_right(bounds, k[:, :, :length])


def test_a_page_that_is_full_is_not_read_again_and_nothing_moves():
    k = keys()
    bounds = Bounds(4).grown(k[:, :, :40])
    k[:, :, :40] = torch.nan
    later = bounds.grown(k[:, :, :41]).grown(k[:, :, :43])
    assert later.room is bounds.room and not later.state.low.isnan().any()
    assert torch.equal(later.state.low[:, :, 10], k[:, :, 40:43].amin(2))


def test_histories_that_part_have_bounds_of_their_own():
    k, other = keys(), keys(46)
    both = Bounds(4).grown(k[:, :, :42])
    one = both.grown(k[:, :, :43])
    turned = torch.cat([k[:, :, :42], other[:, :, :1]], 2)
    require_right(both.grown(turned), turned)
    require_right(one, k[:, :, :43])


@pytest.mark.parametrize("left", [0, 3, 40, 42])
def test_what_came_last_is_taken_back(left):
    k, other = keys(), keys(46)
    bounds = Bounds(4).grown(k)
    cut = bounds.cut(k[:, :, :left])
    if left:
        require_right(cut, k[:, :, :left])
    turned = torch.cat([k[:, :, :left], other[:, :, :7]], 2)
    require_right(cut.grown(turned), turned)
    require_right(bounds, k)


def test_sequences_move():
    k = keys()
    order = torch.tensor([1, 1, 0])
    moved = Bounds(4).grown(k[:, :, :42]).mapped(lambda x: x.index_select(0, order))
    require_right(moved, k[order, :, :42])
    require_right(moved.grown(k[order, :, :44]), k[order, :, :44])
    with pytest.raises(ValueError, match="no pages"):
        Bounds(4).mapped(lambda x: x).state  # noqa: B018


def test_what_was_made_for_inference_is_not_written_outside_of_it():
    k = keys()
    with torch.inference_mode():
        bounds = Bounds(4).grown(k[:, :, :41].clone())
    require_right(bounds.grown(k[:, :, :42]), k[:, :, :42])
