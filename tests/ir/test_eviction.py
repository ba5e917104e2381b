"""Choosing what stays: protected tokens, shares, capacities, heads of their own, padding, ties, fill."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from seen_caches import places_kept, seen

from attnopt.ir.eviction import FAR, Room, choose
from attnopt.passes.kvcache.eviction import KeyNorm, SinksWindow


@dataclass(frozen=True)
class Given(KeyNorm):
    """Scores by place: (j * 5) mod 7, so that there are ties."""

    adaptive: bool = False
    floor: float = 0.2

    def scores(self, made):
        return (made.places * 5 % 7).float() + torch.arange(made.k.shape[1])[:, None] * 0.5


def test_the_best_stay_in_their_order_and_ties_keep_the_earlier():
    # scores of places 0 … 11: 0 5 3 1 6 4 2 0 5 3 1 6
    assert places_kept(Given(), Room(keep=0.25), seen()) == [[[1, 4, 11], [1, 4, 11]]]
    assert places_kept(Given(), Room(capacity=5), seen()) == [[[1, 4, 5, 8, 11]] * 2]
    assert places_kept(Given(), Room(capacity=6), seen()) == [[[1, 2, 4, 5, 8, 11]] * 2]


def test_protected_tokens_stay_and_count():
    assert places_kept(Given(), Room(capacity=4, sinks=1, recent=2), seen()) == [[[0, 4, 10, 11]] * 2]
    assert places_kept(Given(), Room(capacity=2, sinks=3, recent=2), seen()) == [[[0, 1, 2, 10, 11]] * 2]


def test_layers_and_heads_have_shares_of_their_own():
    index, counts = choose(Given(), Room(keep=0.5, heads={2: (0.25, 0.5)}), seen())
    assert counts.sum(-1).tolist() == [[3, 6]]
    assert index.shape[-1] == 6
    assert places_kept(Given(), Room(keep=0.5, heads={2: (0.25, 0.5)}), seen()) == [[[1, 4, 11], [1, 2, 4, 5, 8, 11]]]
    assert places_kept(Given(), Room(keep=0.5, layers={2: 0.25}), seen()) == [[[1, 4, 11]] * 2]
    assert places_kept(Given(), Room(keep=0.25, layers={1: 1.0}), seen()) == [[[1, 4, 11]] * 2]


def test_padding_never_stays_and_shares_are_of_what_is_no_padding():
    made = seen(batch=2, start=(0, 8))
    assert places_kept(Given(), Room(keep=0.5), made) == [[[1, 2, 4, 5, 8, 11]] * 2, [[8, 11]] * 2]
    assert places_kept(Given(), Room(keep=1.0), made)[1] == [[8, 9, 10, 11]] * 2
    assert places_kept(SinksWindow(sinks=1), Room(capacity=2), made) == [[[0, 11]] * 2, [[8, 11]] * 2]


def test_what_holds_no_token_is_never_chosen():
    made = seen()
    holes = made.places.clone()
    holes[0, 0, 3:] = FAR
    kept = places_kept(Given(), Room(capacity=5), replace(made, places=holes))
    assert kept == [[[0, 1, 2], [1, 4, 5, 8, 11]]]


def test_scores_that_are_no_numbers_are_the_lowest():
    @dataclass(frozen=True)
    class Holes(Given):
        def scores(self, made):
            return super().scores(made).masked_fill(made.places == 4, torch.nan)

    assert places_kept(Holes(), Room(capacity=3), seen()) == [[[1, 8, 11]] * 2]


def test_heads_share_the_room_of_a_layer_by_score():
    policy = Given(adaptive=True)
    counts = choose(policy, Room(capacity=4), seen())[1]
    assert counts.sum() == 8
    # Both heads have scores 6, 6, 5, 5, 4, …, those of the second half a point more.
    assert counts.sum(-1).tolist() == [[4, 4]]

    @dataclass(frozen=True)
    class Second(Given):
        def scores(self, made):
            return super().scores(made) + 100 * torch.arange(2)[:, None]

    counts = choose(Second(adaptive=True), Room(capacity=5), seen())[1]
    assert counts.sum(-1).tolist() == [[1, 9]]  # a fifth of 5 is what the first is sure of
    counts = choose(Second(adaptive=True, floor=0.5), Room(capacity=5), seen())[1]
    assert counts.sum(-1).tolist() == [[3, 7]]


@pytest.mark.parametrize("keep", [0.01, 0.3, 1.0])
def test_a_share_is_rounded_up(keep):
    assert Room(keep=keep).tokens(seen()).tolist() == [[{0.01: 1, 0.3: 4, 1.0: 12}[keep]] * 2]
