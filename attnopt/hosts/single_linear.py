"""A model that is one linear layer, in either host: what its time is measured in.

single_linear("onnx", 384, 1536)   ->   x [rows, 384] @ W [384, 1536] + b, `rows` open
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost

OPSET = 17


def single_linear(host: str, inputs: int, outputs: int) -> FxHost | OnnxHost:
    """host: "torch" or "onnx". The weights are random numbers of float32."""
    generator = torch.Generator().manual_seed(inputs + outputs)
    weight = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
    if host == "torch":
        layer = torch.nn.Linear(inputs, outputs).eval()
        layer.weight.data.copy_(weight)
        dims = {"input": {0: torch.export.Dim("rows", min=1)}}
        return FxHost.from_captured(capture(layer, {"input": torch.zeros(7, inputs)}, dims))
    nodes = [
        helper.make_node("MatMul", ["input", "weight"], ["product"], name="product"),
        helper.make_node("Add", ["product", "bias"], ["output"], name="shifted"),
    ]
    held = {"weight": weight.T.contiguous().numpy(), "bias": np.zeros(outputs, np.float32)}
    graph = helper.make_graph(
        nodes, "linear",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ("rows", inputs))],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ("rows", outputs))],
        [onnx.numpy_helper.from_array(array, name) for name, array in held.items()],
    )  # fmt: skip
    return OnnxHost.from_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10))
