"""Q-Filters: the direction of queries, its share of their energy, and the order that it gives."""

from __future__ import annotations

import plain_eviction
import pytest
import torch
from seen_caches import SPEC, places_kept, seen

from attnopt.errors import InputMismatch
from attnopt.ir.eviction import Room
from attnopt.ir.reference import attend
from attnopt.passes.kvcache.eviction import QFilters
from attnopt.passes.kvcache.eviction.q_filters import filters_of


def test_directions_are_those_of_the_plain_form():
    random = torch.Generator().manual_seed(0)
    q = torch.randn(4, 500, 8, generator=random) + torch.randn(4, 1, 8, generator=random)
    found, energy = filters_of(q, 2)
    each = [plain_eviction.main_direction(head) for head in q]
    torch.testing.assert_close(energy, torch.tensor([share for _, share in each]))
    torch.testing.assert_close(
        found.double(), torch.stack([v for v, _ in each]).unflatten(0, (2, 2)).mean(1), atol=1e-5, rtol=1e-5
    )


def test_most_queries_lie_on_the_positive_side():
    direction = torch.nn.functional.normalize(torch.randn(8), dim=0)
    q = torch.rand(1, 100, 1) * direction
    for sign in (1, -1):
        torch.testing.assert_close(filters_of(sign * q, 1)[0][0], sign * direction, atol=1e-5, rtol=1e-5)


def test_queries_of_one_direction_order_keys_as_their_mean_logit_does():
    made = seen(20)
    direction = torch.randn(2, 8)
    q = torch.rand(2, 50, 1) * direction[:, None]
    policy = QFilters({2: filters_of(q, 2)[0]})
    logits = (made.k[0] @ q.mT).mean(-1)
    assert policy.scores(made)[0].argsort().tolist() == logits.argsort().tolist()


def test_equal_to_the_plain_form_and_to_its_clause():
    made, filters = seen(20), torch.randn(2, 8)
    policy = QFilters({2: filters})
    kept = places_kept(policy, Room(capacity=7), made)[0]
    assert kept == plain_eviction.kept(plain_eviction.q_filter(made.k[0], filters), 7)
    by_head = {"filters": filters.repeat_interleave(2, 0)}
    weights = attend(f"{SPEC} {policy.clause(7)}", made.q, made.k, made.v, **by_head).weights[0, ::2, -1]
    assert [torch.nonzero(row).flatten().tolist() for row in weights] == kept


def test_refusals():
    with pytest.raises(InputMismatch, match="query_filters"):
        QFilters().unfit(SPEC, 0)
    assert QFilters({2: torch.ones(2, 8)}).unfit(SPEC, 1) == "no filter was made for it"
    with pytest.raises(InputMismatch, match="do not fit 2 key heads of 8 channels"):
        QFilters({2: torch.ones(2, 4)}).scores(seen())
