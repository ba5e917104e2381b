"""Eigen Attention: rank = width is the identity, models of low rank lose nothing, caches shrink, both hosts agree, decoding goes on."""

from __future__ import annotations

import copy

import hf_models
import pytest
import torch
from decoding_models import named, past_of, step_of
from shrunk_models import IDS, applied, evidence, host, model, output, rewritten, seen

from attnopt.errors import OutOfRange
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.site import Refusal
from attnopt.passes import EigenAttention
from attnopt.passes.edits.heads.candidates import shared_by
from attnopt.passes.edits.heads.statistics import moments, of_weights
from attnopt.passes.edits.heads.writer import write
from attnopt.passes.factorize.eigen_attention import eigen, spectra
from attnopt.plan.options.groups import Grouping

FINE = EigenAttention(thresholds=(1.0, 0.95, 0.8, 0.6), multiple=1)


def of_rank(group, held, k, v):
    block = group.blocks[0]
    keys, values = spectra(held, block.rotary is not None, shared_by(block))
    return eigen(block, keys[1], values[1], k, v)


@pytest.mark.parametrize("family", ["packed", "turned"])
def test_rank_equal_to_width_is_the_identity_in_float64(family):
    exact = FxHost.from_captured(capture(copy.deepcopy(model(family)).double(), {"input_ids": IDS}))
    held = [moments(g, evidence(family, "torch")) for g in Grouping(host(family, "torch")).of("block")]
    made = rewritten(exact, lambda group: write(group, of_rank(group, held[0], 8, 8)))
    assert float((output(made) - output(exact)).abs().max()) < 1e-10


def test_the_rank_reaches_the_threshold_and_all_heads_fit():
    singular = torch.tensor([[4.0, 3.0, 2.0, 1.0], [9.7, 0.1, 0.1, 0.1]], dtype=torch.float64)
    ranks = [EigenAttention(multiple=1).rank(singular, t) for t in (0.4, 0.41, 0.9, 0.95, 1.0)]
    assert ranks == [1, 2, 3, 4, 4]
    assert EigenAttention(multiple=4).rank(singular, 0.4) == 4


@pytest.mark.parametrize("family", ["packed", "turned"])
def test_lower_thresholds_lose_more(family):
    given, found = host(family, "torch"), evidence(family, "torch")
    kinds = [c.kind for c in FINE.propose(Grouping(given).of("block")[0], found)]
    lost = [
        float((output(applied(FINE, found, given, k, [0])) - output(given)).norm())
        for k in kinds
        if k.startswith("threshold") and len(k) < 15
    ]
    assert 0 < lost[0] < lost[-1]


def test_the_hosts_agree():
    made = [applied(FINE, evidence("packed", kind), host("packed", kind), "threshold 0.6") for kind in ("torch", "onnx")]
    torch.testing.assert_close(output(made[0]), output(made[1]), atol=1e-3, rtol=1e-3)
    (one, other) = ([str(s.spec.width) for s in Grouping(m).sites] for m in made)
    assert one == other != ["width(8)"] * 2


def test_keys_and_values_of_few_directions_lose_nothing():
    low = copy.deepcopy(model("packed"))
    with torch.no_grad():
        for attention in low.attentions:
            weight, bias = attention.qkv.weight, attention.qkv.bias
            for start in range(0, 96, 8):  # heads of 8 channels in 3 directions
                u = torch.linalg.qr(torch.randn(8, 3))[0]
                weight[start : start + 8] = u @ u.T @ weight[start : start + 8]
                bias[start : start + 8] = u @ u.T @ bias[start : start + 8]
            weight[32:64], bias[32:64] = weight[:32].clone(), bias[:32].clone()
    given = FxHost.from_captured(capture(low, {"input_ids": IDS}))
    found = seen(given)
    rewrite = EigenAttention(thresholds=(0.9999,), multiple=1)
    candidate = rewrite.propose(Grouping(given).of("block")[0], found)[0]
    assert next(iter(candidate.shapes.values())) == {"h": 4, "g": 4, "d": 3, "e": 3}
    made = applied(rewrite, found, given, "threshold 0.9999")
    torch.testing.assert_close(output(made), output(given), atol=1e-3, rtol=1e-3)


def test_without_data_or_in_no_range_it_says_so():
    group = Grouping(host("packed", "torch")).of("block")[0]
    assert isinstance(EigenAttention().propose(group, None), Refusal)
    with pytest.raises(OutOfRange, match="from 1 to 8"):
        of_rank(group, of_weights(group), 9, 2)
    with pytest.raises(OutOfRange):
        EigenAttention(thresholds=(1.5,))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_decoding_model_keeps_fewer_numbers_and_goes_on(kind):
    """Turned keys are kept as they are before the rotation: all 8 directions change nothing, 4 make the cache half."""
    torch.manual_seed(0)
    language = hf_models.build("llama", "sdpa")
    given = step_of(language, IDS[:, :9], kind)
    past = past_of(language, IDS[:, :8])
    inputs = named(given, IDS[:, 8:9], past)
    found = seen(given, inputs)
    wanted = given.runner()(inputs)[0]
    rewrite = EigenAttention(thresholds=(0.4,), multiple=4)
    group = Grouping(given).of("block")[0]
    half = rewrite.propose(group, found)[0]
    assert half.rows[group.name] == {"k": (2, 4), "v": (2, 4)}
    basis = moments(group, found)
    made = rewritten(given, lambda g: write(g, late(g, basis)), [0])
    got = made.runner()(inputs)[0]
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)
    small = applied(rewrite, found, given, half.kind)
    first = small.runner()(inputs)
    assert [tuple(x.shape) for x in first[1:]] == [(2, 2, 9, 4)] * 4
    again = dict(zip([s.name for s in small.input_specs], (IDS[:, 9:10], *first[1:]), strict=True))
    assert torch.isfinite(small.runner()(again)[0]).all()


def late(group, held):
    """All directions of keys, and still kept before they turn."""
    from dataclasses import replace

    from attnopt.passes.edits.heads.head_map import HeadMap

    changes = of_rank(group, held, 7, 8)
    basis = spectra(held, True, shared_by(group.blocks[0]))[0][1]
    return replace(changes, k=HeadMap.of_bases(basis), up=basis)
