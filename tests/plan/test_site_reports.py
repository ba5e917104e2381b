"""What the report says of one site: the kernel of what it computes now, its cache, or that it is gone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from cached_step import Step, example
from plan_fakes import Kernel

from attnopt.codegen.library.sdpa import Sdpa
from attnopt.codegen.tvm.availability import missing
from attnopt.cost.target import load_target
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.expr import Term, conjunction, conjuncts
from attnopt.passes import Candidate, Int8Cache, Quest
from attnopt.passes.edits.caches.pages import Pages
from attnopt.passes.edits.caches.slots import slots
from attnopt.plan.choose import Chosen
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import Move
from attnopt.plan.options.workshop import Workshop
from attnopt.plan.site_reports import site_report, site_reports
from attnopt.report.data import Choice


@dataclass(frozen=True)
class Window:
    """The last 4 keys, or the last 2."""

    name: str = "window"
    exact: bool = False
    per: str = "site"

    def apply(self, candidate, group):
        window = Term("window", (candidate.options["window"],))
        masked = [s.with_step(self.name, s.spec.with_(mask=conjunction(*conjuncts(s.spec.mask), window))) for s in group.sites]
        return replace(group, sites=tuple(masked))


@pytest.fixture(scope="module")
def host():
    return FxHost.from_captured(capture(Step().eval(), example()))


@pytest.fixture
def shop(host):
    return Workshop(host, {}, load_target("cpu")[0], "torch", 0, host.graph.sizes(host.example_inputs()))


@pytest.fixture
def chosen(host):
    (site,) = Grouping(host).sites
    return Chosen(site, Sdpa(), "measured 2x", (Choice("sdpa", True, "2x", 1e-3),), 2e-3, 1e-3)


def windowed(host, width):
    (group,) = Grouping(host).of("site")
    return Move(Window(), group, Candidate("window", False, "", options={"window": width}, changes=("mask",)))


def test_without_moves_it_is_what_was_chosen(chosen, shop):
    report = site_report(chosen, (), shop)
    assert (report.kernel, report.why, report.before, report.seconds_after) == ("sdpa", "measured 2x", report.after, 1e-3)


def test_a_new_spec_names_the_kernel_that_computes_it(host, chosen, shop, monkeypatch):
    monkeypatch.setattr("attnopt.plan.choose.LOWERINGS", (Kernel("narrow", host="torch"),))
    report = site_report(chosen, (windowed(host, 4), windowed(host, 2)), shop)
    assert "window(2)" in report.after and "window" not in report.before
    assert (report.kernel, report.why) == ("narrow", "predicted to compute the new spec fastest")
    assert (report.seconds_before, report.seconds_after, report.steps) == (2e-3, None, ("window", "window"))
    assert [(c.kernel, c.taken) for c in report.choices] == [("narrow", True), ("sdpa", False)]


def test_the_kernel_is_the_one_that_was_built(host, chosen, shop):
    report = site_report(chosen, (windowed(host, 4),), shop)
    assert report.kernel == shop.kernel_for(Window().apply(windowed(host, 4).candidate, windowed(host, 4).group).sites[0]).name


def test_a_cache_in_other_bits(host, chosen, shop):
    (group,) = Grouping(host).of("model")
    candidate = next(c for c in Int8Cache().propose(group, None) if c.kind == "int8")
    (report,) = site_reports([chosen], (Move(Int8Cache(), group, candidate),), shop)
    assert report.after == f"{report.before} cache(k=int8, v=int8)"
    kernel = ("tvm-decode", None) if missing() is None else ("sdpa", 1e-3)  # the one that reads codes was not timed
    assert (report.kernel, report.seconds_after, report.steps) == (*kernel, ("int8-cache",))


@pytest.mark.skipif(missing() is not None, reason="TVM is not here")
def test_pages_that_a_query_chooses(host, chosen, shop):
    (group,) = Grouping(host).of("model")
    rewrite, left = Quest(size=2, dense=0), SimpleNamespace(mean=0.1, worst=0.2, kept=0.5, bound=0.1)
    candidate = rewrite.candidate(Pages(2, 3), rewrite.pairs(group, slots(group)), [left])
    (report,) = site_reports([chosen], (Move(rewrite, group, candidate),), shop)
    assert (report.kernel, report.why) == ("tvm-pages", "reads the cache as it is stored")


def test_what_is_removed_has_no_kernel(host, chosen, shop):
    (group,) = Grouping(host).of("model")
    gone = Candidate("drop", False, "no attention", kind="1 of 2", changes=("structure",), removes=chosen.site.nodes)
    report = site_report(chosen, (Move(Window(name="drop"), group, gone),), shop)
    assert (report.after, report.kernel, report.why, report.steps) == ("", "removed", "1 of 2", ("drop",))
    assert not any(c.taken for c in report.choices)
