"""SnapKV: against the plain form, its clause, and the checks of its paper's entry."""

from __future__ import annotations

from dataclasses import replace

import plain_eviction
import pytest
import torch
from seen_caches import SPEC, places_kept, seen

from attnopt.errors import OutOfRange
from attnopt.ir.eviction import Room
from attnopt.ir.reference import attend
from attnopt.ir.spec import as_spec
from attnopt.passes.kvcache.eviction import Snapkv


@pytest.mark.parametrize(("window", "kernel", "pooling"), [(4, 5, "mean"), (3, 7, "max"), (1, 1, "mean")])
def test_equal_to_the_plain_form_and_to_its_clause(window, kernel, pooling):
    made, policy = seen(24), Snapkv(window=window, kernel=kernel, pooling=pooling)
    wanted = plain_eviction.snap(made.q[0], made.k[0], 0.5, window, kernel, pooling)
    torch.testing.assert_close(policy.scores(made)[0].double()[:, :-window], wanted[:, :-window], atol=1e-6, rtol=1e-5)
    kept = places_kept(policy, Room(capacity=10), made)[0]
    if pooling == "mean":  # the mean of maxima is not the maximum of means: the reference pools after the mean
        assert kept == plain_eviction.kept(wanted, 10, newest=window)
        weights = attend(f"{SPEC} {policy.clause(10)}", made.q, made.k, made.v).weights[0, ::2, -1]
        assert [torch.nonzero(row).flatten().tolist() for row in weights] == kept


def test_one_query_without_pooling_is_the_attention_of_the_last_token():
    made = seen(24)
    paid = attend(SPEC, made.q, made.k, made.v).weights[0, :, -1].unflatten(0, (2, 2)).mean(1)
    kept = places_kept(Snapkv(window=1, kernel=1), Room(capacity=9), made)[0]
    for row, found in zip(paid, kept, strict=True):
        assert found == sorted([*row[:-1].topk(8).indices.tolist(), 23])


def test_room_for_all_keeps_all():
    assert places_kept(Snapkv(window=4), Room(capacity=30), seen(24)) == [[list(range(24))] * 2]


def test_what_the_window_looks_at_is_kept_with_its_neighbours():
    made = seen(24)
    made.k[:, :, 9] = made.q[:, :2, -1] * 20
    kept = places_kept(Snapkv(window=1, kernel=3), Room(capacity=4), made)[0]
    assert kept[0] == [8, 9, 10, 23]


def test_left_padding_changes_nothing():
    alone = seen(20)
    padded = replace(
        alone,
        k=torch.cat([torch.randn(1, 2, 5, 8) * 9, alone.k], 2),
        v=torch.cat([torch.randn(1, 2, 5, 8), alone.v], 2),
        places=torch.arange(25, dtype=torch.int32).expand(1, 2, 25),
        start=torch.tensor([5]),
        end=25,
        q=torch.cat([torch.randn(1, 4, 5, 8), alone.q], 2),
        q_places=torch.arange(25),
    )
    policy = Snapkv(window=4)
    kept = places_kept(policy, Room(capacity=9), padded)[0]
    assert [[j - 5 for j in row] for row in kept] == places_kept(policy, Room(capacity=9), alone)[0]


def test_soft_caps_count():
    made = seen(24)
    capped = replace(made, spec=as_spec("softmax heads(4, 2) scale(0.5) softcap(0.5) causal"))
    wanted = attend(capped.spec, made.q, made.k, made.v).weights[:, :, -4:]
    torch.testing.assert_close(replace(capped, q=made.q[:, :, -4:], q_places=made.q_places[-4:]).weights(), wanted)


def test_refusals():
    with pytest.raises(OutOfRange, match="kernel odd"):
        Snapkv(kernel=4)
    assert "sink logit" in Snapkv().unfit(as_spec("softmax causal sink(0.0)"), 0)
