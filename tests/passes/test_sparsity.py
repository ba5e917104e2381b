"""Passes that are forms: what they ask for, the order that calibration gives, and a model that runs them through TVM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from self_attention import SelfAttention

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.codegen.sparse import run_sparse
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.reference import attend
from attnopt.ir.site import Refusal
from attnopt.passes import (
    BlockTopk,
    DeltaAttention,
    DilatedWindow,
    HeadWindows,
    Moba,
    Neighborhood,
    PowerAttention,
    SpargeAttn,
)
from attnopt.patterns import recognise
from attnopt.plan.options.groups import Grouping


def grouping(model, length):
    host = FxHost.from_captured(capture(model.eval(), (torch.randn(2, length, 64),), dynamic_shapes={"x": None}))
    return host, Grouping(host, recognise(host.graph).sites)


def evidence(*dropped):
    """As calibration would say of forms in their order."""
    seen = [SimpleNamespace(mean=d, worst=2 * d, kept=1 - d, bound=8 * d, corrected_bound=24 * d) for d in dropped]
    return SimpleNamespace(longest=lambda site: 200, left_out=lambda site, name, forms: seen[: len(forms(site))])


@pytest.fixture(scope="module")
def plain():
    """Self-attention without a mask on 49 positions."""
    return grouping(SelfAttention(), 49)


class Causal(SelfAttention):
    """Each position sees those up to its own."""

    def forward(self, x, seen=None, *, many=False):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def causal():
    return grouping(Causal(), 200)


FORMS = {
    Moba(blocks=((64, 2), (8, 4))): ["causal block_topk(64, 2)", "causal block_topk(8, 4)"],
    BlockTopk(blocks=((64, 2),)): ["causal block_topk(64, 2, rows=64, first=1)"],
    SpargeAttn(tile=(64, 64), settings=("share=0.5",)): ["causal pooled_blocks(64, 64, share=0.5, first=1)"],
    DeltaAttention(gamma=8, bases=((2, 16),)): ["causal & (window(16) | global(2)) delta(8, dense=causal)"],
    PowerAttention(blocks=(16,)): ["causal & (near_blocks(16, 4) | power_blocks(16) | global(16))"],
    DilatedWindow(windows=((8, 64, 4),)): ["causal & (window(8) | window(64) & dilated(4))"],
}


@pytest.mark.parametrize("rewrite", FORMS, ids=lambda r: r.name)
def test_what_a_pass_makes_of_a_spec(rewrite, causal):
    _, groups = causal
    (group,) = groups.of("site")
    found = rewrite.propose(group, evidence(0.3, 0.1))
    made = [rewrite.apply(c, group).sites[0].spec for c in found]
    assert sorted(str(s).split("scale(0.25) ")[1] for s in made) == sorted(FORMS[rewrite])
    assert [c.options["dropped"] for c in found] == sorted(c.options["dropped"] for c in found)
    assert all(rewrite.apply(c, group).sites[0].steps == (rewrite.name,) for c in found)
    assert f"leaves out {found[-1].options['dropped']:.2g} of the weight" in found[-1].description


def test_neighbourhoods_of_a_square(plain):
    _, groups = plain
    (group,) = groups.of("site")
    found = Neighborhood(windows=((3, 1), (3, 2))).propose(group, evidence(0.4, 0.3, 0.2, 0.1))
    assert [c.kind for c in found] == [
        "3 x 3 in an image 2 apart", "3 in a line 2 apart", "3 x 3 in an image", "3 in a line",
    ]  # fmt: skip
    spec = Neighborhood().apply(found[2], group).sites[0].spec
    q, k, v = (torch.randn(1, 4, 49, 16) for _ in range(3))
    seen = (attend(spec, q, k, v).weights[0, 0] > 0).sum(-1)
    assert (seen == 9).all()  # at the border too


def test_neighbourhoods_after_a_class_token():
    _, groups = grouping(SelfAttention(), 50)
    (group,) = groups.of("site")
    found = Neighborhood(windows=((3, 1),)).propose(group, evidence(0.4, 0.3))
    spec = Neighborhood().apply(found[0], group).sites[0].spec
    q, k, v = (torch.randn(1, 4, 50, 16) for _ in range(3))
    seen = (attend(spec, q, k, v).weights[0, 0] > 0).sum(-1)
    assert seen[0] == 50 and (seen[1:] == 10).all()


def test_calibration_says_what_a_form_leaves_out(causal):
    host, groups = causal
    (group,) = groups.of("site")
    inputs = [{"x": torch.randn(2, 200, 64)} for _ in range(2)]
    seen = Evidence(host, Calibration.of(host.graph, inputs), sites=[s for g in groups.of("site") for s in g.sites])
    rewrite = DilatedWindow(windows=((8, 64, 4), (100, 150, 2), (64, 128, 1)))
    found = rewrite.propose(group, seen)
    assert [c.options["kept"] for c in found] == sorted((c.options["kept"] for c in found), reverse=True)
    # Scores of random rows are small: what is dropped is close to the share of pairs that is hidden in each row.
    assert all(0 < c.options["dropped"] < c.options["worst"] <= 1 for c in found)
    spec = rewrite.apply(found[0], group).sites[0].spec
    assert str(spec.mask) == "causal & (window(64) | window(128) & dilated(1))"
    q, k, v = (torch.randn(1, 4, 200, 16) for _ in range(3))
    assert (attend(spec, q, k, v).weights > 0).sum() / (attend("softmax causal", q, k, v).weights > 0).sum() == pytest.approx(
        found[0].options["kept"]
    )


def test_heads_that_look_far_keep_all_keys(causal):
    _, groups = causal
    (group,) = groups.of("site")
    seen = evidence(0.2, 0.1)
    seen.attention = lambda site: SimpleNamespace(kept=lambda s, w, ahead: torch.tensor([0.999, 0.5, 0.95, 0.7]))
    rewrite = HeadWindows(windows=((2, 16),), shares=(0.01, 0.1))
    found = rewrite.propose(group, seen)
    assert [c.kind for c in found] == ["2 sinks and window 16 in 2 of 4 heads", "2 sinks and window 16 in 1 of 4 heads"]
    spec = rewrite.apply(found[0], group).sites[0].spec
    assert str(spec.mask) == "causal & (window(16) | global(2) | h == 1 | h == 3)"
    q, k, v = (torch.randn(1, 4, 100, 16) for _ in range(3))
    right = attend(spec, q, k, v)
    assert [int((right.weights[0, h, 99] > 0).sum()) for h in range(4)] == [18, 100, 18, 100]
    got = run_sparse(lambda s, q, k, v, operands: attend(s, q, k, v, **operands).output, spec, q, k, v, {})
    torch.testing.assert_close(got, right.output)
    far = torch.tensor([60, 120, 60, 9999])
    seen.attention = lambda site: SimpleNamespace(kept=lambda s, w, ahead: (w >= far).double())
    (only,) = HeadWindows(windows=(), widths=(64, 128, 150), sinks=2).propose(group, seen)
    assert only.kind == "2 sinks and a window for each head that loses at most 0.05"
    spec = HeadWindows().apply(only, group).sites[0].spec
    assert str(spec.mask) == "causal & (global(2) | h == 3 | window(64) & (h == 0 | h == 2) | window(128) & h == 1)"
    right = attend(spec, *(torch.randn(1, 4, 200, 16) for _ in range(3))).weights
    assert [int((right[0, h, 199] > 0).sum()) for h in range(4)] == [66, 130, 66, 200]
    seen.attention = lambda site: SimpleNamespace(kept=lambda s, w, ahead: torch.ones(4))
    assert "its heads are alike" in rewrite.propose(group, seen).reason


def test_refusals(plain, causal):
    (both,), (back,) = (groups.of("site") for _, groups in (plain, causal))
    for rewrite, group, given, why in (
        (Moba(), both, evidence(0.1), "it needs a causal mask"),
        (Neighborhood(), back, evidence(0.1), "under a causal mask it is a window"),
        (Moba(blocks=((512, 3),)), back, evidence(0.1), "the smallest choice covers all 200 keys"),
        (SpargeAttn(), back, None, "weighed on calibration data, and there are none"),
        (SpargeAttn(), back, evidence(0.0, 0.0, 0.0), "on no calibration sequence does it leave anything out"),
    ):
        found = rewrite.propose(group, given)
        assert isinstance(found, Refusal) and why in found.reason, rewrite.name
