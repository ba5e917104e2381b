"""The loss of a candidate at its site, against what the model's own tensors say."""

from __future__ import annotations

import functools

import hf_models
import pytest
import torch
from plan_fakes import Off

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.analysis.operands import held, tapped
from attnopt.ir.reference import reference
from attnopt.ir.spec import parse
from attnopt.opening import open_model
from attnopt.passes import Group
from attnopt.patterns import recognise
from attnopt.plan.judge.site_loss import part_loss, site_loss


@functools.cache
def found():
    """Llama in small, one batch of three sequences of which one is padded."""
    opened = open_model(hf_models.build("llama"), hf_models.inputs("llama", batch=3), dynamic_shapes=None, need_inputs=True)
    sites = recognise(opened.host.graph).sites
    return Evidence(opened.host, Calibration.of(opened.host.graph, [opened.inputs]), sites=sites), sites


def windowed(site):
    """A spec that sees the last three tokens and the first."""
    return site.spec.with_(mask=parse(f"softmax ({site.spec.mask}) & (window(3) | global(1))").mask)


def test_another_mask():
    evidence, sites = found()
    loss = site_loss(evidence, sites[1], windowed(sites[1]))
    ((inputs, data),) = evidence.hold(tapped(sites[1]))
    on = held(sites[1], dict(zip(tapped(sites[1]), data, strict=True)), evidence.host.graph.sizes(inputs))
    before, after = (reference(s, on.q, on.k, on.v, **on.operands).double() for s in (sites[1].spec, windowed(sites[1])))
    (real,) = [inputs[name].bool() for name in inputs if name == "attention_mask"]
    wanted = [float((before[i] - after[i])[:, real[i]].norm() / before[i][:, real[i]].norm()) for i in range(3)]
    assert loss.values == pytest.approx(wanted, rel=1e-5)
    assert (loss.samples, loss.metric) == (3, "relative error of the site")
    assert min(wanted) > 0.01


def test_the_same_spec_loses_nothing():
    evidence, sites = found()
    assert site_loss(evidence, sites[0], sites[0].spec).upper == 0.0


def test_a_cache_in_fewer_bits():
    evidence, sites = found()
    losses = [site_loss(evidence, sites[0], parse(f"{sites[0].spec} cache(k={t}, v={t})")).mean for t in ("int8", "int4", "int2")]
    assert 0 < losses[0] < losses[1] < losses[2]
    assert losses[0] < 0.02


def test_operands_of_a_candidate():
    evidence, sites = found()
    spec = parse(f"{sites[0].spec} gate(load(factor, h))")
    loss = site_loss(evidence, sites[0], spec, {"factor": torch.full((4,), 0.75)})
    assert loss.values == pytest.approx((0.25,) * 3, rel=1e-5)


def test_a_part_of_a_rewritten_host():
    """The rewritten part reads what the original computes, whatever stands before it in the copy."""
    evidence, _ = found()
    host = evidence.host
    trial = Off((0.125,)).apply(Off((0.125,)).propose(Group(host, ()), None)[0], Group(host.copy(), ())).host
    trial.finish()
    made = host.graph.outputs[0]
    reads = [v for v in made.producer.inputs if v is not None and not v.is_constant]
    loss = part_loss(evidence, trial, reads, made, trial.graph.outputs[0])
    assert loss.values == pytest.approx((0.125,) * 3, rel=1e-5)
    copy = host.copy()
    assert part_loss(evidence, copy, reads, made, copy.graph.outputs[0]).mean < 1e-6
