"""What fits into memory: inputs are cut where the original would not fit, and kernels that hold the scores are not all timed."""

from __future__ import annotations

import pytest
import torch
from hosts.onnx import small_models
from plan_fakes import Kernel, clock

from attnopt.codegen import LOWERINGS
from attnopt.cost.target import load_target
from attnopt.hosts.onnx import OnnxHost
from attnopt.patterns import recognise
from attnopt.plan.choose import choose
from attnopt.plan.memory.fitting import timed_together, within_memory
from attnopt.plan.timing.predict import example_shapes

LENGTH = 512


@pytest.fixture(scope="module")
def host():
    return OnnxHost.from_model(small_models.spelled_out())


@pytest.fixture(scope="module")
def inputs():
    return {name: torch.randn(1, 4, LENGTH, 8) for name in "qkv"}


def test_inputs_are_cut_until_the_original_fits(host, inputs):
    """Two matrices of 4 x 512 x 512 numbers are 8.4 MB; of 256 x 256 a quarter of that."""
    cut, said = within_memory(host, inputs, 4e6)
    assert {tuple(t.shape) for t in cut.values()} == {(1, 4, 256, 8)}
    assert all(torch.equal(cut[n], inputs[n][:, :, :256]) for n in "qkv")
    assert "512 -> 256" in said and "GiB" in said


@pytest.mark.parametrize("room", [None, 1e9])
def test_what_fits_stays(host, inputs, room):
    assert within_memory(host, inputs, room) == (inputs, "")


def test_nothing_is_cut_below_a_size_that_means_something(host):
    short = {name: torch.randn(1, 4, 64, 8) for name in "qkv"}
    assert within_memory(host, short, 1.0) == (short, "")


def test_what_fits_at_no_size_stays(host, inputs):
    assert within_memory(host, inputs, 1e3) == (inputs, "")


def test_kernels_that_hold_the_scores_are_left_out_where_others_are_predicted_faster(host, inputs):
    (site,) = recognise(host.graph).sites
    fits = [x for x in LOWERINGS if x.name in ("ort-mha", "ort-gqa", "tvm-prefill")]
    shapes, target = example_shapes(host, site, inputs), load_target("cpu")[0]
    assert timed_together(site, fits, target, shapes, "onnx", None) == (True, fits, [])
    assert timed_together(site, fits, target, shapes, "onnx", 1e12) == (True, fits, [])
    whole, kept, told = timed_together(site, fits, target, shapes, "onnx", 1e3)
    assert not whole
    assert kept and {c.kernel for c in told} == {"original", *(x.name for x in fits)} - {x.name for x in kept}
    assert all(c.why.startswith("not timed: it holds") for c in told)


def test_without_the_original_the_fastest_of_the_others_is_taken(monkeypatch, host, inputs):
    kernels = [Kernel("one"), Kernel("other")]
    monkeypatch.setattr("attnopt.plan.choose.LOWERINGS", tuple(kernels))
    monkeypatch.setattr("attnopt.plan.choose.timed_together", lambda site, fits, *rest: (False, fits, []))
    asked: list[list[str]] = []
    monkeypatch.setattr("attnopt.plan.choose.in_turn", clock({"one": 2.0, "other": 1.0}, asked))
    (chosen,) = choose(host, recognise(host.graph).sites, inputs, runtime="onnxruntime", opset=host.opset, select="measure")
    assert asked == [["one", "other"]]
    assert (chosen.lowering, chosen.seconds_before, chosen.seconds_after) == (kernels[1], None, 1.0)
