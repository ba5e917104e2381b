"""ONNX models of a few nodes, made in an instant, for tests that need no export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

FLOAT = TensorProto.FLOAT
INT64 = TensorProto.INT64


def value(name: str, shape: Sequence[int | str] | None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[str] = ("y",),
    weights: dict[str, Any] | None = None,
    opset: int = 17,
) -> onnx.ModelProto:
    """Outputs are float of unknown shape; weights are arrays by name."""
    made = [onnx.numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "small", inputs, [value(name, None) for name in outputs], made)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def attention(opset: int, q: Sequence[Any], k: Sequence[Any] = (), mask: Sequence[Any] = (), **attrs: Any) -> onnx.ModelProto:
    """One Attention node over the model's inputs; its output is the model's."""
    inputs = [value("q", q), value("k", k or q), value("v", k or q), *([value("m", mask)] if mask else [])]
    names = ["q", "k", "v", *(["m"] if mask else [])]
    return model([helper.make_node("Attention", names, ["y"], name="attention", **attrs)], inputs, opset=opset)


def spelled_out(opset: int = 17) -> onnx.ModelProto:
    """softmax(q k' / sqrt(8)) v on [batch, 4, length, 8]; the attention's output is the model's."""
    shape = ["batch", 4, "length", 8]
    nodes = [
        helper.make_node("Transpose", ["k"], ["kt"], name="turned", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["s"], name="scores"),
        helper.make_node("Mul", ["s", "scale"], ["scaled"], name="scaled"),
        helper.make_node("Softmax", ["scaled"], ["p"], name="weights", axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["y"], name="output"),
    ]
    return model(nodes, [value(n, shape) for n in "qkv"], weights={"scale": np.float32(8**-0.5)}, opset=opset)


def two_layers() -> onnx.ModelProto:
    """softmax(q k') v twice, the second reading queries from the first."""
    nodes = []
    for i, (q, y) in enumerate((("q", "x"), ("x", "y"))):
        nodes += [
            helper.make_node("Transpose", ["k"], [f"kt{i}"], name=f"turned{i}", perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", [q, f"kt{i}"], [f"s{i}"], name=f"scores{i}"),
            helper.make_node("Softmax", [f"s{i}"], [f"p{i}"], name=f"weights{i}", axis=-1),
            helper.make_node("MatMul", [f"p{i}", "v"], [y], name=f"output{i}"),
        ]
    return model(nodes, [value(n, ["batch", 4, "length", 8]) for n in "qkv"])
