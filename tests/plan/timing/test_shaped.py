"""Inputs of asked shapes: made from the example's where sizes are open, refused with a reason where a call cannot be timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hosts.onnx import small_models
from plan_fakes import clock

from attnopt.cost.target import load_target
from attnopt.cost.workload import parse_workload
from attnopt.errors import WorkloadError
from attnopt.hosts.onnx import OnnxHost
from attnopt.patterns import recognise
from attnopt.plan.budgeted import UNTIMED
from attnopt.plan.pipeline import Request, run
from attnopt.plan.search.effort import EFFORTS
from attnopt.plan.timing.shaped import resized, shaped

CPU = load_target("cpu")[0]


@pytest.fixture(scope="module")
def host():
    return OnnxHost.from_model(small_models.spelled_out())


def asked(host, text, effort=EFFORTS["low"], inputs=None):
    sites = recognise(host.graph).sites
    return shaped(host, sites, inputs or host.example_inputs(), parse_workload(text), CPU, "onnxruntime", effort)


def test_the_example_is_repeated_or_cut(host):
    inputs = host.example_inputs()
    sizes = host.graph.sizes(inputs)
    longer = {name: 2 * size + 1 for name, size in sizes.items()}
    made = resized(host, inputs, longer)
    for name, tensor in made.items():
        whole, old = host.graph.inputs[list(inputs).index(name)].shape, inputs[name]
        for axis, dim in enumerate(whole):
            assert tensor.shape[axis] == (dim if isinstance(dim, int) else 2 * old.shape[axis] + 1)
        assert torch.equal(tensor[tuple(slice(n) for n in old.shape)], old)
    assert all(torch.equal(x, inputs[name]) for name, x in resized(host, made, sizes).items())


def test_loads_have_weights_and_the_heaviest_is_first(host):
    made = asked(host, "prefill:4@0.25 prefill:512x2@0.75")
    assert made.why == ""
    assert [weight for weight, _ in made.loads] == [0.75, 0.25]
    assert [{x.shape[::2] for x in inputs.values()} for _, inputs in made.loads] == [{(2, 512)}, {(1, 4)}]


def test_what_would_take_too_long_or_too_much_memory_is_not_run(host, monkeypatch):
    made = asked(host, "prefill:4 prefill:2048x8", replace(EFFORTS["low"], seconds=1e-3))
    assert made.loads == () and "too long to time at effort low" in made.why
    monkeypatch.setattr("attnopt.plan.timing.shaped.free_memory", lambda inputs: 2.0**20)
    made = asked(host, "prefill:2048x8")
    assert made.loads == () and "GiB are free here" in made.why and "'prefill:2048x8' takes about" in made.why


def test_a_model_that_does_not_run_there_says_so(host, monkeypatch):
    def fails(inputs):
        raise RuntimeError("sizes differ\nmore")

    monkeypatch.setattr(OnnxHost, "runner", lambda self: fails)
    assert asked(host, "prefill:8").why == "the model does not run on inputs made for 'prefill:8': sizes differ"


def test_a_shape_that_the_model_cannot_have_is_an_error(host):
    with pytest.raises(WorkloadError):
        asked(host, "decode:8")


def request_for(host, text, **changes):
    given = {"select": "measure", "inputs": host.example_inputs(), "workload": parse_workload(text)} | changes
    return Request("cpu", "onnxruntime", host.opset, **given)


def test_the_whole_model_is_timed_at_the_asked_shapes(host, monkeypatch):
    timed = []

    def in_turn(calls, **_):
        timed.extend(call.args[0]["q"].shape[::2] for call in calls.values())
        return clock({"after": 0.5})(calls)

    monkeypatch.setattr("attnopt.plan.pipeline.in_turn", in_turn)
    monkeypatch.setattr("attnopt.plan.choose.in_turn", clock({}))
    _, report = run(host, request_for(host, "prefill:33x3"))
    assert timed == [(3, 33), (3, 33)]
    assert (report.seconds_before, report.seconds_after) == (1.0, 0.5)
    assert not any(note.startswith(UNTIMED) for note in report.notes)


def test_a_report_says_why_nothing_was_timed(host, monkeypatch):
    monkeypatch.setattr("attnopt.plan.timing.shaped.free_memory", lambda inputs: 1.0)
    _, report = run(host, request_for(host, "prefill:64"))
    assert [n for n in report.notes if n.startswith(UNTIMED) and n.endswith("GiB are free here")]
    assert report.seconds_after is None
