"""What kernels of scaled, biased softmax are asked first, and the one tensor that they get for masks and biases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lowering_cases import BIAS, SEEN, Case, inputs, opened

from attnopt.codegen.additive_mask import additive_mask, plain_softmax, scaled_then_biased

HALF = torch.finfo(torch.float32).min / 2


def test_weights_that_are_read_need_the_original_nodes():
    _, site = opened(Case("softmax"), "torch")
    assert plain_softmax(site) is None
    refused = plain_softmax(replace(site, weights_used=site.nodes[0]))
    assert refused is not None
    assert refused.reason == "the attention weights themselves are read here, and a fused kernel never makes them"
    assert refused.at is site.nodes[0]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("softmax heads(4, 2, map=table)", "query heads are mapped to key heads by a table"),
        ("softmax norm(l2) gate(0.5)", "qk_norm is not part of this kernel"),
        ("softmax scale(0.5) add(3.0) scale(2.0)", "score terms 'scale(0.5) add(3.0) scale(2.0)' do not fit scale, then bias"),
    ],
)
def test_refusals(spec, reason):
    _, site = opened(Case(spec, heads=(4, 2)), "torch")
    refused = scaled_then_biased(site)
    assert refused is not None
    assert (refused.reason, refused.at) == (reason, site.name)


def test_a_soft_cap_only_where_the_kernel_has_one():
    _, site = opened(Case("softmax scale(0.5) softcap(30.0)"), "torch")
    assert scaled_then_biased(site, softcap=True) is None
    assert scaled_then_biased(site) is not None


@pytest.mark.parametrize(
    ("spec", "boolean", "wanted"),
    [
        ("softmax", True, None),
        ("softmax add(3.0)", False, None),
        (f"softmax {SEEN} empty(zero)", True, lambda x: x["seen"]),
        (f"softmax {SEEN} empty(zero)", False, lambda x: torch.where(x["seen"], 0.0, -torch.inf)),
        (f"softmax {SEEN}", True, lambda x: torch.where(x["seen"], 0.0, HALF)),
        (f"softmax add({BIAS})", True, lambda x: x["bias"]),
        (f"softmax add({BIAS}) add((k - q) * 2) {SEEN}", True,
         lambda x: torch.where(x["seen"], x["bias"] + (torch.arange(12) - torch.arange(12)[:, None]) * 2, HALF)),
    ],
)  # fmt: skip
def test_one_tensor(spec, boolean, wanted):
    case = Case(spec)
    trial, site = opened(case, "torch")
    node = site.output.value.producer
    assert node is not None
    made = additive_mask(site, trial.builder(node), boolean=boolean)
    assert (made is None) == (wanted is None)
    if made is not None:
        trial.replace(site.output.value, made)
        trial.finish()
        (got,) = trial.runner()(inputs(case))
        torch.testing.assert_close(got, wanted(inputs(case)), atol=1e-6, rtol=1e-6)
