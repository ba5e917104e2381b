"""Damage inside a model is told in words before anything runs; an edit that breaks a model is not handed over."""

from __future__ import annotations

import onnx
import pytest
import torch
from hosts.onnx import small_models
from hosts.onnx.small_models import value
from onnx import helper

from attnopt.errors import UnreadableModel, UnsupportedFormat
from attnopt.hosts.onnx import OnnxHost


def relu(name: str, source: str, made: str) -> onnx.NodeProto:
    return helper.make_node("Relu", [source], [made], name=name)


DAMAGED = {
    "circle": (
        [helper.make_node("Add", ["x", "z"], ["y"], name="a"), relu("b", "y", "z")],
        "read each other in a circle",
    ),
    "made_twice": ([relu("a", "x", "y"), relu("b", "x", "y")], "'y' is redeclared"),
    "dangling_output": ([relu("a", "x", "z")], "output 'y' is made by nothing"),
    "dangling_input": ([relu("a", "nowhere", "y")], "'nowhere', read by node 'a', is made by nothing"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("from_file", [False, True])
def test_damaged_graphs(name, from_file, tmp_path):
    nodes, said = DAMAGED[name]
    proto = small_models.model(nodes, [value("x", [2])])
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UnreadableModel, match=said) as raised:
        OnnxHost.from_model(path if from_file else proto)
    assert raised.value.next_move


def test_weight_with_too_few_bytes():
    proto = small_models.model([helper.make_node("Add", ["x", "w"], ["y"])], [value("x", [4])])
    proto.graph.initializer.append(onnx.TensorProto(name="w", dims=[4], data_type=1, raw_data=b"\0" * 7))
    with pytest.raises(UnreadableModel, match="weight 'w' has 7 bytes of 16"):
        OnnxHost.from_model(proto)


def test_nodes_in_a_wrong_order_are_put_right():
    proto = small_models.model([helper.make_node("Neg", ["z"], ["y"]), relu("a", "x", "z")], [value("x", [2])])
    assert [n.op for n in OnnxHost.from_model(proto).graph.nodes] == ["relu", "neg"]


@pytest.mark.parametrize("given", [onnx.GraphProto(), onnx.NodeProto(), 3])
def test_what_is_no_model(given):
    with pytest.raises(UnsupportedFormat, match="is not a whole model"):
        OnnxHost.from_model(given)


def test_the_long_name_of_the_default_domain():
    proto = small_models.model([relu("a", "x", "y")], [value("x", [2])])
    proto.opset_import[0].domain = "ai.onnx"
    assert OnnxHost.from_model(proto).opset == 17
    proto.opset_import[0].version = 12
    with pytest.raises(UnsupportedFormat, match="opset 12"):
        OnnxHost.from_model(proto)


def test_weights_listed_as_inputs_are_no_inputs():
    proto = small_models.model(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [value("x", [2]), value("w", [2])],
        weights={"w": torch.ones(2).numpy()},
    )
    proto.ir_version = 3
    host = OnnxHost.from_model(proto)
    assert [s.name for s in host.input_specs] == ["x"]
    assert host.runner()({"x": torch.ones(2)})[0].tolist() == [2.0, 2.0]


def test_an_unsound_edit_is_not_handed_over():
    host = OnnxHost.from_model(small_models.spelled_out())
    site = host.graph.nodes[-1]
    made = host.builder(site).call("::Softmax", site.inputs[0], shape=site.output.shape, dtype="float32", axes=[1])
    host.replace(site.output, made)
    with pytest.raises(RuntimeError, match=r"is not sound: node 'attnopt_Softmax'"):
        host.finish()
