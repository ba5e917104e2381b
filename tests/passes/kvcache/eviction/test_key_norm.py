"""Key norm: short keys stay, whatever their position turns them by; first and normalised layers keep all."""

from __future__ import annotations

from dataclasses import replace

import plain_eviction
import torch
from plain_eviction import rotation
from seen_caches import SPEC, places_kept, seen

from attnopt.ir.eviction import Room
from attnopt.ir.reference import attend
from attnopt.ir.spec import as_spec
from attnopt.passes.kvcache.eviction import KeyNorm


def test_equal_to_the_plain_form_and_to_its_clause():
    made = seen(20)
    kept = places_kept(KeyNorm(), Room(capacity=7), made)[0]
    assert kept == plain_eviction.kept(plain_eviction.key_norm(made.k[0]), 7)
    weights = attend(f"{SPEC} {KeyNorm().clause(7)}", made.q, made.k, made.v).weights[0, ::2, -1]
    assert [torch.nonzero(row).flatten().tolist() for row in weights] == kept


def test_positions_change_nothing():
    made = seen(20)
    turned = torch.stack([made.k[:, :, j].double() @ rotation(j, 8).T for j in range(20)], 2).float()
    torch.testing.assert_close(KeyNorm().scores(replace(made, k=turned)), KeyNorm().scores(made))


def test_short_keys_that_take_much_attention_survive():
    made = seen(20)
    made.k[:, :, 0] *= 0.01
    assert all(head[0] == 0 for head in places_kept(KeyNorm(), Room(capacity=1), made)[0])


def test_layers_that_keep_all():
    assert "first 2 layers" in KeyNorm().unfit(SPEC, 1)
    assert KeyNorm().unfit(SPEC, 2) == KeyNorm(whole=0).unfit(SPEC, 0) == ""
    assert "normalised" in KeyNorm().unfit(as_spec("softmax norm(rms) causal"), 5)
    assert KeyNorm().unfit(as_spec("softmax norm(rms, on=q) causal"), 5) == ""
