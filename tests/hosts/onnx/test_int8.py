"""int8 layers in standard operators: each form of a layer, shared inputs, changed constants, and what onnxruntime makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hosts.onnx import small_models
from onnx import helper

from attnopt.hosts.onnx import OnnxHost

X = {"x": torch.randn(9, 64, generator=torch.Generator().manual_seed(0))}


def model(*nodes, outputs):
    random = np.random.default_rng(0)
    weights = {"w": (random.standard_normal((64, 96)) / 8).astype(np.float32), "b": random.standard_normal(96).astype(np.float32)}
    weights["turned"] = weights["w"].T.copy()
    return OnnxHost.from_model(small_models.model(list(nodes), [small_models.value("x", ["n", 64])], outputs, weights))


@pytest.mark.parametrize(
    ("op", "inputs", "attrs"),
    [
        ("MatMul", ["x", "w"], {}),
        ("Gemm", ["x", "w", "b"], {}),
        ("Gemm", ["x", "turned", "b"], {"transB": 1}),
        ("Gemm", ["x", "w", "b"], {"alpha": 2.0, "beta": 0.5}),
    ],
)
def test_every_form_of_a_layer(op, inputs, attrs):
    host = model(helper.make_node(op, inputs, ["y"], name="layer", **attrs), outputs=["y"])
    copy = host.copy()
    copy.quantize_linears(list(copy.graph.of("linear", "matmul")))
    copy.finish()
    assert [n.op_type for n in copy.model.graph].count("MatMulInteger") == 1
    assert not {n.op_type for n in copy.model.graph} & {"MatMul", "Gemm"}
    wanted, got = host.runner()(X)[0], copy.runner()(X)[0]
    assert 1e-4 < float((got - wanted).norm() / wanted.norm()) < 0.02
    assert copy.output_names == ["y"]
    assert "w" not in copy.model.graph.initializers and "turned" not in copy.model.graph.initializers


def test_layers_that_read_one_value_quantise_it_once():
    nodes = [helper.make_node("MatMul", ["x", "w"], [f"y{i}"], name=f"layer{i}") for i in range(2)]
    host = model(*nodes, helper.make_node("Add", ["y0", "y1"], ["z"]), outputs=["z"])
    for node in host.graph.of("matmul"):
        host.quantize_linears([node])
    host.finish()
    assert [n.op_type for n in host.model.graph].count("DynamicQuantizeLinear") == 1


def test_factors_move_between_input_and_weight():
    """(x / s) (W s) is x W: with powers of two, and an input divided in the graph, only the rounding differs."""
    host = model(helper.make_node("MatMul", ["x", "w"], ["y"], name="layer"), outputs=["y"])
    (node,) = host.graph.of("matmul")
    s = torch.exp2(torch.arange(64.0) % 3 - 1)
    builder = host.builder(node)
    divided = builder.emit("mul", node.inputs[0], builder.constant(1 / s, "float32"), shape=node.inputs[0].shape, dtype="float32")
    plain = host.copy().runner()(X)[0]
    host.quantize_linears([node], {"layer": s}, {"layer": divided})
    host.finish()
    got = host.runner()(X)[0]
    assert float((got - plain).norm() / plain.norm()) < 0.03
    assert next(n.op_type for n in host.model.graph) == "Mul"


def test_a_constant_is_changed_here_only():
    host = model(helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="layer"), outputs=["y"])
    copy = host.copy()
    bias = next(v for n in copy.graph.nodes for v in n.inputs if v is not None and v.is_constant and v.shape == (96,))
    copy.set_constant(bias, bias.load() + 1.0)
    copy.finish()
    torch.testing.assert_close(copy.runner()(X)[0], host.runner()(X)[0] + 1.0, atol=1e-5, rtol=1e-5)
