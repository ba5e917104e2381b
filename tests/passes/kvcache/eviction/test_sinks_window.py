"""Sinks and window: the first tokens, the newest ones, and what the spec's clause shows."""

from __future__ import annotations

import torch
from seen_caches import SPEC, places_kept, seen

from attnopt.ir.eviction import Room
from attnopt.ir.reference import attend
from attnopt.passes.kvcache.eviction import SinksWindow


def test_first_and_newest_stay():
    assert places_kept(SinksWindow(sinks=2), Room(capacity=5), seen()) == [[[0, 1, 9, 10, 11]] * 2]
    assert places_kept(SinksWindow(sinks=0), Room(capacity=5), seen()) == [[[7, 8, 9, 10, 11]] * 2]


def test_no_room_for_a_window_leaves_the_newest():
    assert places_kept(SinksWindow(sinks=2), Room(capacity=1), seen()) == [[[0, 1, 11]] * 2]


def test_equal_to_its_clause():
    made, policy = seen(), SinksWindow(sinks=2)
    weights = attend(f"{SPEC} {policy.clause(5)}", made.q, made.k, made.v).weights[0, ::2, -1]
    assert [torch.nonzero(row).flatten().tolist() for row in weights] == places_kept(policy, Room(capacity=5), made)[0]
