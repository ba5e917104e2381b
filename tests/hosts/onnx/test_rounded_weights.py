"""Narrow weights under onnxruntime's own operator: every form of a layer, width, group and grid; and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hosts.onnx import small_models
from onnx import helper

from attnopt.hosts.onnx import OnnxHost
from attnopt.hosts.onnx.rounded_weights import refusal
from attnopt.passes.edits.layers.linear_layers import matrix
from attnopt.rounding.grids import Gridding
from attnopt.rounding.weight_format import WeightFormat

X = {"x": torch.randn(9, 96, generator=torch.Generator().manual_seed(0))}
INPUTS_ROUNDED = 0.02  # what rounding x to 8 bits may lose, relative


def model(op="MatMul", inputs=("x", "w"), **attrs):
    random = np.random.default_rng(0)
    weights = {"w": (random.standard_normal((96, 64)) / 8).astype(np.float32), "b": random.standard_normal(64).astype(np.float32)}
    weights["turned"] = weights["w"].T.copy()
    node = helper.make_node(op, list(inputs), ["y"], name="layer", **attrs)
    return OnnxHost.from_model(small_models.model([node], [small_models.value("x", ["n", 96])], ["y"], weights))


def stored(host, format, kind="squares"):
    """(what the float model gives on the weights that the codes stand for, what the model on the codes gives)."""
    (node,) = host.graph.of("linear", "matmul")
    made = Gridding(kind).rounded(matrix(node), format)
    copy, wanted = host.copy(), host.copy()
    copy.store_rounded({node.name: made})
    copy.finish()
    (twin,) = wanted.graph.of("linear", "matmul")
    wanted.set_constant(twin.inputs[1], made.matrix() if node.op == "linear" else made.matrix().T)
    wanted.finish()
    return wanted.runner()(X)[0], copy.runner()(X)[0], copy


def tied():
    """y = table[ids] w1 table': the head is the transpose of the embedding, by a node."""
    random = np.random.default_rng(0)
    weights = {
        "table": random.standard_normal((96, 64)).astype(np.float32),
        "w": random.standard_normal((64, 64)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["e"], name="embedding"),
        helper.make_node("MatMul", ["e", "w"], ["h"], name="layer"),
        helper.make_node("Transpose", ["table"], ["turned"], name="turned", perm=[1, 0]),
        helper.make_node("MatMul", ["h", "turned"], ["y"], name="head"),
    ]
    given = [small_models.value("x", ["n"], small_models.INT64)]
    return OnnxHost.from_model(small_models.model(nodes, given, ["y"], weights))


def test_a_head_that_is_tied_to_the_embedding_is_a_linear_layer_that_can_be_changed_alone():
    host, ids = tied(), {"x": torch.tensor([3, 95])}
    head = host.graph.nodes[-1]
    assert [n.op for n in host.graph.nodes] == ["gather", "matmul", "linear"]
    assert head.inputs[1] is host.graph.nodes[0].inputs[0]
    wanted = host.runner()(ids)[0]
    made = Gridding().rounded(matrix(head), WeightFormat(8, 32))
    rounded, eight, doubled = host.copy(), host.copy(), host.copy()
    rounded.store_rounded({"head": made})
    eight.quantize_linears([eight.graph.nodes[-1]])
    doubled.set_input(doubled.graph.nodes[-1], doubled.graph.nodes[-1].inputs[1], 2 * matrix(head))
    for changed, factor in ((rounded, 1), (eight, 1), (doubled, 2)):
        changed.finish()
        assert (
            "Transpose" not in {n.op_type for n in changed.model.graph} and changed.model.graph.initializers["table"] is not None
        )
        got = changed.runner()(ids)[0]
        assert float((got - factor * wanted).norm() / wanted.norm()) < INPUTS_ROUNDED


FORMS = [
    ("MatMul", ["x", "w"], {}),
    ("Gemm", ["x", "w", "b"], {}),
    ("Gemm", ["x", "turned", "b"], {"transB": 1}),
    ("Gemm", ["x", "w", "b"], {"alpha": 2.0, "beta": 0.5}),
]


@pytest.mark.parametrize(("op", "inputs", "attrs"), FORMS)
def test_every_form_of_a_layer(op, inputs, attrs):
    wanted, got, copy = stored(model(op, inputs, **attrs), WeightFormat(4, 32))
    assert [n.op_type for n in copy.model.graph].count("MatMulNBits") == 1
    assert not {n.op_type for n in copy.model.graph} & {"MatMul", "Gemm"}
    assert 0 < float((got - wanted).norm() / wanted.norm()) < INPUTS_ROUNDED
    assert copy.output_names == ["y"]
    assert not {"w", "turned"} & set(copy.model.graph.initializers)


GRIDS = [(16, False, "squares"), (32, True, "squares"), (0, False, "squares"), (0, False, "gaussian"), (32, False, "gaussian")]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("group", "zeros", "kind"), GRIDS)
def test_every_width_and_grid(bits, group, zeros, kind):
    format = WeightFormat(bits, group, zeros)
    wanted, got, copy = stored(model(), format, kind)
    assert float((got - wanted).norm() / wanted.norm()) < INPUTS_ROUNDED
    found = copy.stored_codes({"layer": format})
    if kind == "squares":  # the file holds all that was given
        made = Gridding(kind).rounded(matrix(next(model().graph.of("matmul"))), format).arrays()
        assert all(torch.equal(found["layer"][name], x) for name, x in made.items())
    else:
        assert not found


def test_blocks_that_the_operator_has_not_are_refused():
    assert refusal(WeightFormat(4, 32), 96) is None
    assert refusal(WeightFormat(4), 96) is None
    assert "blocks of 48" in str(refusal(WeightFormat(4, 48), 96))
    assert "rows of 100 inputs" in str(refusal(WeightFormat(4), 100))
    host = model()
    (node,) = host.graph.of("matmul")
    assert host.refuses_rounded(node, WeightFormat(4, 32)) is None
    assert "blocks of 48" in str(host.refuses_rounded(node, WeightFormat(4, 48)))
