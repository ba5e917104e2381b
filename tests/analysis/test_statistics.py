"""What is read from statistics: buckets of positions, shares of a head's weight, and their way to a file and back."""

from __future__ import annotations

import pytest
import torch

from attnopt.analysis.attention_mass import CELLS, cell
from attnopt.analysis.statistics import (
    BUCKETS,
    AttentionStatistics,
    ChannelStatistics,
    bucket,
    buckets_below,
    joined,
    parts,
)


def channels(width=2):
    ones = torch.ones(width, dtype=torch.float64)
    return ChannelStatistics(7, ones, 2 * ones, -3 * ones, ones)


def seen(weights):
    """Statistics of weights [H, Q, K] whose queries stand at 0, 1, 2, …"""
    heads, queries, keys = weights.shape
    cells = cell(torch.arange(queries), keys).flatten()
    mass = torch.stack([torch.bincount(cells, w.double().flatten(), minlength=CELLS) for w in weights]) / queries
    zeros = torch.zeros(heads, dtype=torch.float64)
    shaped = mass.reshape(heads, BUCKETS, 2 * BUCKETS)
    return AttentionStatistics("site", queries, shaped, zeros, zeros, zeros, channels(), channels(), channels())


def test_buckets_are_powers_of_two():
    assert bucket(torch.tensor([0, 1, 2, 3, 4, 7, 8, 1023, 1024])).tolist() == [0, 1, 2, 2, 3, 3, 4, 10, 11]
    assert int(bucket(torch.tensor(2**40))) == BUCKETS - 1
    assert [buckets_below(n) for n in (-1, 0, 1, 2, 3, 4, 5, 8)] == [0, 0, 1, 2, 2, 3, 3, 4]
    assert buckets_below(2**40) == BUCKETS - 1  # the last bucket has no end: it is below nothing


@pytest.mark.parametrize(("first", "window", "lookahead"), [(0, 0, 0), (4, 0, 0), (0, 8, 0), (0, 0, 4), (1, 2, 2), (4, 16, 8)])
def test_shares_equal_those_of_the_weights(first, window, lookahead):
    weights = torch.softmax(torch.randn(3, 40, 40) * 3, -1)
    q, k = torch.arange(40)[:, None], torch.arange(40)
    kept = (k < first) | ((q >= k) & (q - k < window)) | ((k > q) & (k - q < lookahead))
    wanted = (weights.double() * kept).sum((1, 2)) / 40
    torch.testing.assert_close(seen(weights).kept(first, window, lookahead), wanted, rtol=1e-12, atol=1e-12)


def test_what_is_no_power_of_two_is_never_too_high():
    found = seen(torch.softmax(torch.randn(2, 40, 40), -1))
    assert torch.equal(found.kept(first=7, window=13), found.kept(first=4, window=8))
    assert bool((found.kept(first=8) > found.kept(first=7)).all())


def test_shares_by_distance_and_by_key():
    weights = torch.zeros(1, 4, 4)
    weights[0, [0, 1, 2, 3], [0, 0, 2, 1]] = 1.0  # distances 0, 1, 0, 2; keys 0, 0, 2, 1
    found = seen(weights)
    assert found.by_distance[0, :4].tolist() == [0.5, 0.25, 0.25, 0.0]
    assert found.by_key[0, :4].tolist() == [0.5, 0.25, 0.25, 0.0]


def test_there_and_back():
    found = seen(torch.softmax(torch.randn(2, 5, 5), -1))
    again = joined(AttentionStatistics, parts(found), site="site")
    assert (again.site, again.rows, again.q.rows) == ("site", 5, 7)
    assert torch.equal(again.mass, found.mass)
    assert torch.equal(again.v.low, found.v.low)
    assert joined(ChannelStatistics, parts(channels())).rows == 7
