"""Expected Attention: against the plain form, its clause, and the checks of its paper's entry."""

from __future__ import annotations

from dataclasses import replace

import plain_eviction
import torch
from plain_eviction import rotation
from scipy.stats import spearmanr
from seen_caches import SPEC, places_kept, seen

from attnopt.ir.eviction import Room
from attnopt.ir.reference import attend
from attnopt.passes.kvcache.eviction import ExpectedAttention, KeyNorm


def turning(length):
    def future(count):
        return torch.stack([rotation(length + t, 8) for t in range(count)]).mean(0)[None, None].float()

    return future


def test_equal_to_the_plain_form_and_to_its_clause():
    made = seen(20, future=turning(20))
    policy = ExpectedAttention(future=6, sinks=3)
    turns = [rotation(20 + t, 8) for t in range(6)]
    wanted = plain_eviction.expected(made.plain[0], made.k[0], made.v[0], turns, 0.5, 3)
    torch.testing.assert_close(policy.scores(made)[0].double()[:, 3:], wanted[:, 3:], atol=1e-6, rtol=1e-4)
    kept = places_kept(policy, Room(capacity=9), made)[0]
    assert kept == plain_eviction.kept(wanted, 9, first=3)
    mean, covariance = policy.statistics(made)
    words = {"mean": mean[0], "covariance": covariance[0]}
    weights = attend(f"{SPEC} {policy.clause(9)}", made.q, made.k, made.v, **words).weights[0, ::2, -1]
    assert [torch.nonzero(row).flatten().tolist() for row in weights] == kept


def test_the_score_is_the_mean_of_what_gaussian_queries_pay():
    random = torch.Generator().manual_seed(0)
    mean, spread = torch.randn(8, generator=random), torch.randn(8, 8, generator=random) * 0.3
    q = mean + torch.randn(400_000, 8, generator=random) @ spread.T
    k = torch.randn(5, 8, generator=random)
    z = 0.5 * k @ mean + 0.125 * ((k @ spread @ spread.T) * k).sum(-1)
    torch.testing.assert_close((0.5 * q @ k.T).exp().mean(0), z.exp(), rtol=0.02, atol=0.0)


def test_without_spread_and_turn_it_is_the_softmax_of_the_mean_query():
    made = seen(20)
    policy = ExpectedAttention(sinks=0, covariance=False, values=False)
    q = made.plain.mean(2, keepdim=True)
    wanted = torch.softmax(0.5 * q @ made.k.repeat_interleave(2, 1).mT, -1)[:, :, 0].unflatten(1, (2, 2)).mean(2)
    torch.testing.assert_close(policy.scores(made).float(), wanted)


def test_it_ranks_as_later_queries_do_and_better_than_key_norms():
    random = torch.Generator().manual_seed(1)
    mean = torch.randn(1, 4, 1, 8, generator=random)
    made = seen(64, plain=mean + 0.7 * torch.randn(1, 4, 64, 8, generator=random))
    later = mean + 0.7 * torch.randn(1, 4, 2000, 8, generator=random)
    paid = torch.softmax(0.5 * later @ made.k.repeat_interleave(2, 1).mT, -1).mean(2).unflatten(1, (2, 2)).mean(2)

    def agreement(policy):
        return spearmanr(policy.scores(made)[0].flatten(), paid[0].flatten()).statistic

    assert agreement(ExpectedAttention(sinks=0, values=False)) > 0.95
    assert agreement(ExpectedAttention(sinks=0, values=False)) > agreement(KeyNorm())


def test_chances_below_the_least_number_keep_their_order():
    made = seen(20)
    policy = ExpectedAttention(sinks=0, covariance=False, values=False)
    z = made.k[0].repeat_interleave(2, 0) @ (60 * made.plain[0]).mean(1)[..., None]
    far = policy.scores(replace(made, plain=60 * made.plain))[0]
    assert (z.amax() - z.amin()) > 100
    assert all(len(row.unique()) == 20 for row in far)


def test_padding_counts_nowhere():
    alone = seen(20)
    pad = torch.full((1, 4, 3, 8), 50.0)
    padded = replace(
        alone,
        k=torch.cat([pad[:, :2], alone.k], 2),
        v=torch.cat([pad[:, :2], alone.v], 2),
        places=torch.arange(23, dtype=torch.int32).expand(1, 2, 23),
        start=torch.tensor([3]),
        end=23,
        q_places=torch.arange(23),
        plain=torch.cat([pad, alone.plain], 2),
    )
    torch.testing.assert_close(ExpectedAttention().scores(padded)[:, :, 7:], ExpectedAttention().scores(alone)[:, :, 4:])
