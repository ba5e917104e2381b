"""A higher opset keeps weights, outputs, modules and lines; what cannot be converted is refused with a reason."""

from __future__ import annotations

import onnx
import pytest
import torch
from hosts.onnx import small_models
from hosts.onnx.small_models import value
from onnx import helper
from onnx_exports import export

from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Refusal
from attnopt.patterns import recognise


@pytest.mark.parametrize("external", [False, True])
def test_weights_and_origins_stay(external, tmp_path):
    proto = onnx.ModelProto.FromString(export("bert", "eager", "dynamo").SerializeToString())
    onnx.save_model(proto, tmp_path / "m.onnx", save_as_external_data=external, size_threshold=64)
    host = OnnxHost.from_model(tmp_path / "m.onnx")
    before = [s.source for s in recognise(host.graph).sites]
    converted = host.convert_opset(23)
    assert isinstance(converted, OnnxHost)
    assert (host.opset, converted.opset) == (20, 23)
    assert [s.source for s in recognise(converted.graph).sites] == before
    assert before[0].module == "encoder.layer.0.attention.self"
    assert [s.name for s in converted.input_specs] == [s.name for s in host.input_specs]
    held, kept = (h.model.graph.initializers["embeddings.word_embeddings.weight"].const_value for h in (host, converted))
    assert held is kept
    named = host.example_inputs()
    torch.testing.assert_close(converted.runner()(named), host.runner()(named))


def test_refusals():
    host = OnnxHost.from_model(small_models.spelled_out(opset=17))
    assert "is above 16 already" in str(host.convert_opset(16))
    assert "does not convert to opset 99" in str(host.convert_opset(99))
    strange = small_models.model([helper.make_node("Upsample", ["x", "s"], ["y"])], [value("x", [2]), value("s", [1])], opset=13)
    assert isinstance(OnnxHost.from_model(strange).convert_opset(18), Refusal)
