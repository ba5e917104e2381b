"""Planted channels are found, in q and k, aligned and by frequency; even channels are not."""

from __future__ import annotations

import torch

from attnopt.analysis.massive_values import massive_values, slow_channels
from attnopt.analysis.running import RunningChannels
from attnopt.analysis.statistics import AttentionStatistics
from attnopt.ir.block import Rotary

WIDTH = 16


def channels(heads, planted=()):
    x = torch.randn(200, heads, WIDTH, generator=torch.Generator().manual_seed(heads))
    for head, channel in planted:
        x[:, head, channel] *= 20.0
    running = RunningChannels(heads * WIDTH)
    running.add(x.flatten(1))
    return running.value()


def seen(q, k, v=()):
    none = torch.zeros(4)
    return AttentionStatistics("layer", 200, none, none, none, none, channels(4, q), channels(2, k), channels(2, v))


def rotary(interleaved=False):
    frequencies = 10000.0 ** -(torch.arange(8) / 8.0)
    return Rotary(16, 0, interleaved, frequencies, 10000.0, 1.0, None)


def test_planted_channels_are_found():
    found = massive_values(seen([(1, 7), (3, 15)], [(0, 7)]), (4, 2, 2), rotary())
    assert found.q.nonzero().tolist() == [[1, 7], [3, 15]]
    assert found.k.nonzero().tolist() == [[0, 7]]
    assert not found.v.any() and found.found
    assert (found.slow, found.aligned) == (1.0, 1.0)  # channels 7 and 15 are the slowest pair; query head 1 reads key head 0


def test_alignment_and_frequency_are_shares():
    found = massive_values(seen([(0, 7)], [(0, 7), (1, 0)]), (4, 2, 2), rotary())
    assert found.aligned == 0.5
    assert abs(found.slow - 2 / 3) < 1e-6


def test_even_channels_are_not_massive():
    found = massive_values(seen([], []), (4, 2, 2), rotary())
    assert not found.found
    assert (found.slow, found.aligned) == (None, None)
    assert massive_values(seen([(0, 1)], []), (4, 2, 2), factor=1000.0).found is False


def test_slow_channels_follow_the_layout():
    assert slow_channels(rotary(), 16).nonzero().flatten().tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert slow_channels(rotary(True), 20).nonzero().flatten().tolist() == list(range(8, 16))
