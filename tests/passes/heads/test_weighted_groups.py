"""Weighted groups: the limit cases of mean pooling, heads that differ by a rotation only, and weights that are the least squares."""

from __future__ import annotations

import pytest
import torch
from shrunk_models import applied, evidence, host, output, rewritten

from attnopt.passes import MeanPooling, WeightedGroups
from attnopt.passes.edits.heads.changes import HeadChanges
from attnopt.passes.edits.heads.groups import aligned, contiguous, nearest_in_pairs
from attnopt.passes.edits.heads.head_map import HeadMap
from attnopt.passes.edits.heads.statistics import moments
from attnopt.passes.edits.heads.writer import write
from attnopt.passes.heads.weighted_groups import by_channel, by_head
from attnopt.plan.options.groups import Grouping

from shrunk_models import seen as seen_by  # isort: skip


def test_as_many_groups_as_heads_is_the_identity():
    given = host("packed", "torch")
    made = applied(WeightedGroups(groups=(4,)), evidence("packed", "torch"), given, "4 of 4 heads")
    torch.testing.assert_close(output(made), output(given), atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("family", ["packed", "turned"])
def test_heads_that_differ_by_a_rotation_are_pooled_without_loss(family):
    given = host(family, "torch").copy()
    for block in Grouping(given).blocks:
        heads = len(block.k.channels)
        weight = {layer.weight: layer.matrix().clone() for layer in (block.k, block.v)}
        for side, layer in (("k", block.k), ("v", block.v)):
            first = layer.rows()[0]
            for h in range(heads):
                basis = torch.linalg.qr(torch.randn(8, 8))[0] if block.rotary is None or side == "v" else in_pairs()
                weight[layer.weight][layer.channels[h]] = basis @ first
            if layer.bias is not None:
                given.set_constant(layer.bias, torch.zeros_like(layer.bias.load()))
        for value, held in weight.items():
            turned = next(layer.transposed for layer in (block.k, block.v) if layer.weight is value)
            given.set_constant(value, held.mT.contiguous() if turned else held)
    given.finish()
    found = seen_by(given)
    kind = f"1 of {heads} heads"
    lost = [
        float((output(applied(rewrite, found, given, kind)) - output(given)).norm() / output(given).norm())
        for rewrite in (WeightedGroups(), WeightedGroups(align=False), MeanPooling())
    ]
    assert lost[0] < 1e-3 < 1e-2 < min(lost[1:])


def in_pairs() -> torch.Tensor:
    angles = torch.rand(4) * 6
    made = torch.eye(8)
    for i, (c, s) in enumerate(zip(angles.cos(), angles.sin(), strict=True)):
        made[i, i], made[i, i + 4], made[i + 4, i], made[i + 4, i + 4] = c, -s, s, c
    return made


def test_aligning_heads_by_itself_changes_nothing():
    given = host("turned", "torch")
    seen = moments(Grouping(given).of("block")[0], evidence("turned", "torch"))

    def turn(group):
        block = group.blocks[0]
        keys = aligned(seen.keys, contiguous(2, 1), block.rotary)
        write(group, HeadChanges(HeadMap.of_bases(keys.repeat_interleave(2, 0)), HeadMap.of_bases(keys)))

    torch.testing.assert_close(output(rewritten(given, turn)), output(given), atol=2e-5, rtol=2e-5)


def test_the_angle_of_each_pair_is_found():
    from types import SimpleNamespace

    wanted = in_pairs().double()
    rotary = SimpleNamespace(dims=8, first=0, interleaved=False)
    torch.testing.assert_close(nearest_in_pairs(wanted, rotary) @ wanted.mT, torch.eye(8, dtype=torch.float64), atol=1e-6, rtol=0)


def test_weights_are_the_least_squares():
    torch.manual_seed(0)
    keys, queries = torch.randn(4, 60, 3, dtype=torch.float64), torch.randn(4, 20, 3, dtype=torch.float64)
    cross = torch.einsum("ila,jlb->ijab", keys, keys)
    metric = torch.einsum("hla,hlb->hab", queries, queries)
    w = by_head(cross, metric, ((0, 1), (2, 3)))

    def lost(w, heads):
        shared = sum(w[h] * keys[h] for h in heads)
        return float(sum((queries[h] @ (keys[h] - shared).mT).square().sum() for h in heads))

    for heads in ((0, 1), (2, 3)):
        best = lost(w, heads)
        for h in heads:
            for step in (-0.01, 0.01):
                moved = w.clone()
                moved[h] += step
                assert lost(moved, heads) > best
    by_channels = by_channel(cross, metric, ((0, 1), (2, 3)))
    assert lost(by_channels, (0, 1)) < lost(w, (0, 1))
