"""What options lose at their sites, in one pass, and how that spreads what a kind loses."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import hf_models
import pytest

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.ir.spec import parse
from attnopt.opening import open_model
from attnopt.passes import Candidate
from attnopt.patterns import recognise
from attnopt.plan.groups import Grouping
from attnopt.plan.proposals import classes_of
from attnopt.plan.quality import Loss
from attnopt.plan.site_errors import site_errors
from attnopt.plan.site_loss import site_loss
from attnopt.plan.survey import spread


class Windows:
    """Of each attention the last two, and the last four tokens."""

    name, exact, per = "windows", False, "site"

    def propose(self, group, evidence):
        return [
            Candidate(self.name, False, f"window {w}", kind=f"window {w}", changes=("mask",), options={"w": w}) for w in (2, 4)
        ]

    def apply(self, candidate, group):
        (site,) = group.sites
        mask = parse(f"softmax ({site.spec.mask}) & window({candidate.options['w']})").mask
        return SimpleNamespace(sites=(site.with_step(self.name, site.spec.with_(mask=mask)),))


@functools.cache
def found():
    """Llama in small, two batches of three and two sequences, of which some are padded."""
    opened = open_model(hf_models.build("llama"), hf_models.inputs("llama", batch=3), dynamic_shapes=None, need_inputs=True)
    sites = recognise(opened.host.graph).sites
    few = {name: x[:2] for name, x in opened.inputs.items()}
    evidence = Evidence(opened.host, Calibration.of(opened.host.graph, [opened.inputs, few]), sites=sites)
    return evidence, sites, classes_of(Grouping(opened.host, tuple(sites)), (Windows(),), evidence)


def searching(seconds=0.0):
    evidence, _, classes = found()
    spent = SimpleNamespace(seconds=seconds, over=seconds > 1.0)
    losses = SimpleNamespace(additive=lambda x: x)
    made = {o.kind: ("windows",) for each in classes for o in each.options if o.moves}
    return SimpleNamespace(
        evidence=evidence, classes=classes, spent=spent, effort=SimpleNamespace(seconds=1.0), losses=losses, alone={}, errors={},
        passes_of=made.__getitem__,
    )  # fmt: skip


def test_squares_of_what_each_site_loses():
    evidence, sites, classes = found()
    errors = site_errors(searching())
    assert errors.keys() == {(g, i) for g in range(len(classes)) for i in (1, 2)}
    for g, each in enumerate(classes):
        ((site, after),) = each.options[1].specs()
        assert site.name == sites[g].name
        losses = site_loss(evidence, site, after.spec).values
        assert min(losses) ** 2 <= errors[g, 1] <= max(losses) ** 2
        assert errors[g, 2] < errors[g, 1]


def test_nothing_where_time_is_up():
    assert site_errors(searching(seconds=2.0)) == {}


def test_a_kind_is_spread_as_its_sites_lose():
    search = searching()
    search.errors = {(0, 1): 4.0, (1, 1): 1.0, (0, 2): 1.0, (1, 2): 1.0}
    assert spread(search)["windows: window 2"] == {0: 0.8, 1: 0.2}
    search.alone = {(0, 2): Loss("x", 0.1, 0.1, 1), (1, 2): Loss("x", 0.2, 0.2, 1)}
    parts = spread(search)
    assert parts["windows: window 4"] == pytest.approx({0: 1 / 3, 1: 2 / 3})
    assert parts["windows: window 2"] == pytest.approx({0: 0.4 / 0.6, 1: 0.2 / 0.6})  # four times, and once, what the other loses
    search.errors = {}
    assert spread(search)["windows: window 2"] == pytest.approx({0: 1 / 3, 1: 2 / 3})


def test_a_site_that_cannot_be_tapped_leaves_all_unknown(monkeypatch):
    search = searching()
    monkeypatch.setattr(type(search.evidence), "can_tap", lambda self, values: False)
    assert site_errors(search) == {}
