"""A centred stream needs no layer norms: outputs stay, the norms are by root mean square, and the stream can be rotated then."""

from __future__ import annotations

import hf_models
import onnx_exports
import pytest
import torch
from folded_models import EXPORTED, folded, host, refusals, require_equal

from attnopt.hosts.onnx import OnnxHost
from attnopt.passes import CenterStream
from attnopt.passes.rotation import rotated
from attnopt.plan.options.groups import Grouping


@pytest.mark.parametrize("options", [{}, {"norm": "mean"}, {"tied": True}, {"shared": True}])
def test_outputs_stay_and_no_norm_takes_the_mean_off(options):
    given = host(**options)
    made = folded(CenterStream(), given)
    require_equal(made, given)
    kinds = [g.norm.kind for g in Grouping(made).of("linear") if g.norm is not None]
    assert set(kinds[:-1]) <= {"rms"} and kinds[-1] == ("layer" if options.get("tied") else "rms")


def test_gpt2_in_onnx_computes_the_same_without_means():
    given = OnnxHost.from_model(onnx_exports.export("gpt2", "eager", "dynamo"))
    made = folded(CenterStream(), given)
    inputs = given.named_inputs(onnx_exports.tensors(hf_models.inputs("gpt2")))
    torch.testing.assert_close(made.runner()(inputs)[0], given.runner()(inputs)[0], atol=1e-5, rtol=1e-5)
    assert {g.norm.kind for g in Grouping(made).of("linear") if g.norm is not None} == {"rms"}


def test_a_layer_that_stands_twice_is_centred_once():
    made = folded(CenterStream(), host(shared=True))
    one, two = Grouping(made).blocks
    assert one.o.weight is two.o.weight
    torch.testing.assert_close(one.o.matrix().mean(0), torch.zeros(24, dtype=torch.float64), atol=1e-12, rtol=0.0)


def test_a_centred_stream_can_be_rotated():
    given = host()
    made = folded(CenterStream(), given)
    (group,) = Grouping(made).of("model")
    found = rotated(group)
    assert found.stream and Grouping(given).stream.refuses_rotation() is not None
    found.write(made)
    made.finish()
    require_equal(made, given)


def test_norms_that_see_the_mean_are_refused():
    assert refusals(CenterStream(), host(**EXPORTED)) == ["a rms norm reads the stream: it sees the mean"]
