"""fuse-attention leaves the spec as it is, notes its step, and refuses where the weights themselves are read."""

from __future__ import annotations

import torch
from hosts.onnx import small_models
from self_attention import SPEC, SelfAttention
from torch import nn

import attnopt
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Refusal
from attnopt.passes import FuseAttention, Group
from attnopt.patterns import recognise


def hosts():
    yield FxHost.from_captured(capture(SelfAttention().eval(), (torch.randn(2, 5, 64),)))
    yield OnnxHost.from_model(small_models.spelled_out())


def test_proposes_one_kernel_and_keeps_the_spec():
    for host in hosts():
        group = Group(host, recognise(host.graph).sites)
        (candidate,) = FuseAttention().propose(group, None)
        assert (candidate.pass_name, candidate.exact, candidate.nodes) == ("fuse-attention", True, ())
        done = FuseAttention().apply(candidate, group)
        assert [site.steps for site in done.sites] == [("fuse-attention",)]
        assert [site.spec for site in done.sites] == [site.spec for site in group.sites]
        assert done.host is host
        assert [site.steps for site in group.sites] == [()]


class WeightsOut(nn.Module):
    """Returns its attention weights beside the result, as models do with output_attentions."""

    def forward(self, q, k, v):
        weights = (q @ k.mT * 0.25).softmax(-1)
        return weights @ v, weights


def test_weights_that_are_read_cannot_vanish():
    q, k, v = (torch.randn(2, 4, 5, 16) for _ in range(3))
    host = FxHost.from_captured(capture(WeightsOut(), (q, k, v)))
    (site,) = recognise(host.graph).sites
    refused = FuseAttention().propose(Group(host, (site,)), None)
    assert isinstance(refused, Refusal)
    assert refused.reason == "the attention weights themselves are read, and a fused kernel never makes them"
    assert refused.node == site.weights_used.name
    fast = attnopt.optimize(WeightsOut(), (q, k, v), select="always")
    assert [(s.kernel, s.steps) for s in fast.report.sites] == [("original", ())]
    assert refused.reason in fast.report.sites[0].why
    torch.testing.assert_close(fast(q, k, v), WeightsOut()(q, k, v))


def test_the_rewritten_model_computes_the_same():
    model, x = SelfAttention().eval(), torch.randn(2, 5, 64)
    fast = attnopt.optimize(model, (x,), select="always", passes=["fuse-attention"])
    (site,) = fast.report.sites
    assert (site.before, site.after, site.steps) == (SPEC, SPEC, ("fuse-attention",))
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
