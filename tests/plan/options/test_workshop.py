"""Building plans: edits, new specs and kernels in one copy; prices by prediction and by what was timed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from plan_fakes import Kernel
from torch import nn

from attnopt.codegen.library.sdpa import Sdpa
from attnopt.cost.target import load_target
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.expr import Term, apply
from attnopt.ir.site import Refusal
from attnopt.passes import Candidate, DynamicInt8
from attnopt.passes.candidate import Per
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import classes_of, moves_of
from attnopt.plan.options.workshop import Workshop
from attnopt.plan.timing.pricing import Load, Prices, Timed, passes_of


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.o = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        length = torch.arange(x.shape[1])
        scores = (q @ k.mT * 0.25).masked_fill(length[None] > length[:, None], -torch.inf)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class Window:
    """The last 4 keys."""

    name: str = "window"
    exact: bool = False
    per: Per = "site"

    def propose(self, group, evidence):
        return [Candidate(self.name, False, "4 keys", kind="window 4", changes=("mask",))]

    def apply(self, candidate, group):
        masked = [s.with_step(self.name, s.spec.with_(mask=apply("and", s.spec.mask, Term("window", (4,))))) for s in group.sites]
        return replace(group, sites=tuple(masked))


@pytest.fixture(scope="module")
def shop():
    host = FxHost.from_captured(capture(Causal().eval(), (torch.randn(2, 12, 64),)))
    (site,) = Grouping(host).sites
    sizes = host.graph.sizes(host.example_inputs())
    return Workshop(host, {site.name: Sdpa()}, load_target("cpu")[0], "torch", 0, sizes)


@pytest.fixture(scope="module")
def classes(shop):
    return classes_of(Grouping(shop.host), (Window(), DynamicInt8()), None)


def windowed(model, x, w):
    q, k, v = model.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
    behind = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])[None]
    scores = (q @ k.mT * 0.25).masked_fill((behind < 0) | (behind >= w), -torch.inf)
    return model.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_specs_edits_and_kernels_in_one_copy(shop, classes):
    assert [len(c.options) for c in classes] == [2, 2, 2]
    x, model = torch.randn(2, 20, 64), Causal().eval()
    run = {picks: shop.built(moves_of(classes, picks)).runner()({"x": x})[0] for picks in ((0, 0, 0), (1, 0, 0), (1, 1, 1))}
    with torch.no_grad():
        torch.testing.assert_close(run[0, 0, 0], model(x), atol=1e-5, rtol=1e-5)
        wanted = windowed(model, x, 4)
    torch.testing.assert_close(run[1, 0, 0], wanted, atol=1e-5, rtol=1e-5)
    assert 1e-4 < float((run[1, 1, 1] - wanted).norm() / wanted.norm()) < 0.05
    with torch.no_grad():
        torch.testing.assert_close(shop.host.runner()({"x": x})[0], model(x), atol=1e-6, rtol=1e-6)


def test_where_only_weights_change_kernels_are_written_once(shop, classes, monkeypatch):
    fresh, x, moves = replace(shop, known={}), torch.randn(2, 20, 64), moves_of(classes, (0, 1, 1))
    wanted = fresh.rewritten(moves).runner()({"x": x})[0]
    first = fresh.built(moves_of(classes, (0, 1, 0))).runner()({"x": x})[0]
    monkeypatch.setattr("attnopt.plan.options.workshop.emit", None)
    assert torch.equal(fresh.built(moves).runner()({"x": x})[0], wanted)
    assert not torch.equal(first, wanted)
    assert torch.equal(fresh.built(moves_of(classes, (0, 1, 0))).runner()({"x": x})[0], first)


def test_a_spec_without_a_kernel_is_refused(shop, classes, monkeypatch):
    monkeypatch.setattr("attnopt.plan.choose.LOWERINGS", (Kernel("refusing", reason="not today", host="torch"),))
    bare = replace(shop, known={})
    ((_, changed),) = classes[0].options[1].specs()
    refused = bare.kernel_for(changed)
    assert isinstance(refused, Refusal) and refused.reason == "not today"
    with pytest.raises(RuntimeError, match=r"no kernel computes 'softmax .* window\(4\).*: not today"):
        bare.built(moves_of(classes, (1, 0, 0)))


def test_prices(shop, classes):
    prices = Prices(shop, [Load(shop.sizes)])
    int8 = classes[1].options[1]
    before, after = prices.predicted(int8)
    assert before > 0 and prices.saved(int8) == before - after
    assert prices.saved(classes[1].options[0]) == 0
    twice = Prices(shop, [Load(shop.sizes, 0.5), Load({name: 64 * size for name, size in shop.sizes.items()}, 0.5)])
    assert twice.predicted(int8)[0] > 5 * before
    prices.timed[int8.kind, ""] = Timed(saved=8e-3, touched=2 * before, options=2)
    assert prices.saved(int8) == pytest.approx(4e-3)
    assert Timed(6e-3, 0.0, 3).share(0.0) == pytest.approx(2e-3)  # no price is known: equal shares


def test_a_kind_that_was_not_timed_is_predicted_as_wrongly_as_its_kin(shop, classes):
    prices = Prices(shop, [Load(shop.sizes)])
    int8, window = classes[1].options[1], classes[0].options[1]
    smoothed = replace(int8, moves=tuple(replace(m, candidate=replace(m.candidate, kind="int8 smoothed")) for m in int8.moves))
    before, after = prices.predicted(smoothed)
    alone = prices.saved(window)
    prices.timed["other", ""] = Timed(saved=3e-3, touched=2 * before, options=2, promised=1e-3, passes=passes_of(int8))
    assert prices.saved(smoothed) == pytest.approx(3 * (before - after))
    assert prices.saved(window) == alone  # another pass
    prices.timed["other", ""] = Timed(saved=3e-3, touched=2 * before, options=2, promised=-1e-3, passes=passes_of(int8))
    assert prices.saved(smoothed) == pytest.approx(
        before - after + 2e-3
    )  # what was predicted to cost saved: by as much of what is touched
