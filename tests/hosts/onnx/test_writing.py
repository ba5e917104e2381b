"""Writing over the very files that a model is read from."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx_exports import export

from attnopt.hosts.onnx import OnnxHost
from attnopt.patterns import recognise
from attnopt.plan.choose import apply_choices, choose


def test_over_its_own_weights(tmp_path):
    proto = onnx.ModelProto.FromString(export("bert", "eager", "dynamo").SerializeToString())
    path = tmp_path / "m.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="m.onnx.data", size_threshold=64)
    host = OnnxHost.from_model(path)
    named = host.example_inputs()
    wanted = host.runner()(named)
    chosen = choose(host, recognise(host.graph).sites, None, runtime="onnxruntime", opset=host.opset, select="always")
    result = apply_choices(host, chosen)
    result.save(path, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    for now in (result, result.copy(), OnnxHost.from_model(path)):
        torch.testing.assert_close(now.runner()(named), wanted, atol=1e-4, rtol=1e-4)
        assert all(v.load() is not None for n in now.graph.nodes for v in n.inputs if v is not None and v.is_constant)
    with pytest.raises(ValueError, match="invalid"):  # never the new file at the old offsets
        host.runner()
