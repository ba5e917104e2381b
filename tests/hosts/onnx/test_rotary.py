"""RotaryEmbedding nodes, standard and contributed, mean what onnxruntime computes, and a block is read through them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from canonical import compute
from onnx import TensorProto, helper, numpy_helper

from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.graph import Graph
from attnopt.patterns import recognise
from attnopt.patterns.block import find_block

B, L, H, D = 2, 5, 4, 8
FREQUENCY = 10000.0 ** (-np.arange(0, D, 2) / D)


def tables(dims: int):
    angle = np.arange(16)[:, None] * FREQUENCY[: dims // 2]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def model(*, contrib: bool, flat: bool, dims: int = D, layer: bool = False, **attrs):
    """One node on x; with `layer`, the queries of an attention between two products."""
    shape = [B, L, H * D] if flat else [B, H, L, D]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    inputs.append(helper.make_tensor_value_info("positions", TensorProto.INT64, [B, L]))
    cos, sin = tables(dims)
    weights = {"cos": cos, "sin": sin}
    if dims != D:
        attrs["rotary_embedding_dim"] = dims
    if flat or contrib:
        attrs["num_heads"] = H
    read = "q" if layer else "x"
    names = [read, "positions", "cos", "sin"] if contrib else [read, "cos", "sin", "positions"]
    made = "turned" if layer else "y"
    node = helper.make_node("RotaryEmbedding", names, [made], name="rotary", domain="com.microsoft" if contrib else "", **attrs)
    nodes = [node]
    if layer:
        generator = np.random.default_rng(0)
        weights |= {n: generator.standard_normal((H * D, H * D)).astype(np.float32) for n in ("wq", "wk", "wv", "wo")}
        nodes = [*(helper.make_node("MatMul", ["x", f"w{n}"], [n], name=n) for n in "qkv"), node]
        nodes.append(helper.make_node("Attention", [made, "k", "v"], ["heads"], name="attention", q_num_heads=H, kv_num_heads=H))
        nodes.append(helper.make_node("MatMul", ["heads", "wo"], ["o"], name="o"))
        nodes.append(helper.make_node("Add", ["x", "o"], ["y"], name="residual"))
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    held = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "rotary", inputs, [out], held)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def evaluated(graph: Graph, given: dict[str, torch.Tensor]) -> torch.Tensor:
    known = {v: given[v.name] for v in graph.inputs}
    for node in graph.nodes:
        known[node.output] = compute(node, [known[i] if i in known else i.load() for i in node.inputs], {})
    return known[graph.outputs[0]]


@pytest.mark.parametrize("contrib", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("dims", [D, 4])
def test_the_node_means_its_parts(contrib, flat, interleaved, dims):
    host = OnnxHost.from_model(model(contrib=contrib, flat=flat, dims=dims, interleaved=interleaved))
    assert not list(host.graph.of("opaque"))
    x = torch.randn([B, L, H * D] if flat else [B, H, L, D])
    given = {"x": x, "positions": torch.stack([torch.arange(3, 8), torch.arange(L)])}
    (wanted,) = host.runner()(given)
    torch.testing.assert_close(evaluated(host.graph, given), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("contrib", [False, True])
def test_a_block_with_a_rotary_node(contrib):
    host = OnnxHost.from_model(model(contrib=contrib, flat=True, layer=True))
    (site,) = recognise(host.graph).sites
    block = find_block(host.graph, site)
    assert str(block) == "q 32x32, k 32x32, v 32x32; rotary 8 half base 10000 on q; o 32x32; residual"
    assert block.rotary.positions.value.name == "positions"
