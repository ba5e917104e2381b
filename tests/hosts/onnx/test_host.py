"""The ONNX host: replaced attentions compute the same, files are read and written soundly, inputs are checked."""

from __future__ import annotations

import hf_models
import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx_exports import export, tensors

from attnopt.errors import InputMismatch, OutputNotWritable, UnreadableModel, UnsupportedFormat
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Refusal
from attnopt.patterns import recognise
from attnopt.plan.choose import apply_choices, boundary, choose


def fused(host: OnnxHost, select: str = "always", inputs=None) -> OnnxHost:
    sites = recognise(host.graph).sites
    return apply_choices(host, choose(host, sites, inputs, runtime="onnxruntime", opset=host.opset, select=select))


def operators(host: OnnxHost) -> list[str]:
    return [n.op_type for n in host.model.graph]


@pytest.fixture(scope="module")
def bert():
    return export("bert", "eager", "dynamo")


def test_standard_attention_after_conversion():
    host = OnnxHost.from_model(export("llama", "eager", "dynamo"))
    converted = host.convert_opset(23)
    assert not isinstance(converted, Refusal)
    sites = recognise(converted.graph).sites
    result = apply_choices(converted, choose(converted, sites, None, runtime="other", opset=23, select="always"))
    assert operators(result).count("Attention") == 2
    named = tensors(hf_models.inputs("llama", "none"))
    torch.testing.assert_close(result.runner()(named)[0], host.runner()(named)[0], atol=1e-4, rtol=1e-4)


def test_names_of_inputs_and_outputs_stay(bert):
    host = OnnxHost.from_model(bert)
    result = fused(host)
    assert result.output_names == [o.name for o in bert.graph.output]
    assert [s.name for s in result.input_specs] == [i.name for i in bert.graph.input]


def test_isolated_part_computes_what_the_model_holds(bert):
    host = OnnxHost.from_model(bert)
    named = host.example_inputs()
    site = recognise(host.graph).sites[1]
    read = boundary(site)
    (wanted,) = host.tap([site.output.value], named)
    torch.testing.assert_close(host.isolate(read, [site.output.value])(host.tap(read, named))[0], wanted)


def test_int8_layers_are_near(bert):
    host = OnnxHost.from_model(bert)
    named = host.example_inputs()
    copy = host.copy()
    layers = [n for n in copy.graph.of("linear", "matmul") if n.inputs[1].is_constant]
    copy.quantize_linears(layers[1:])
    assert operators(copy).count("MatMulInteger") == len(layers) - 1
    wanted, got = host.runner()(named)[0], copy.runner()(named)[0]
    assert 0 < (got - wanted).abs().max() < 0.05
    assert "MatMulInteger" not in operators(host)


def test_round_trip(bert, tmp_path):
    host = fused(OnnxHost.from_model(bert))
    host.save(tmp_path / "m.onnx", {"attnopt.report": "{}"})
    again = OnnxHost.from_model(tmp_path / "m.onnx")
    assert again.metadata["attnopt.report"] == "{}"
    named = host.example_inputs()
    torch.testing.assert_close(again.runner()(named), host.runner()(named))
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert len(again.model.graph.initializers) == len(host.model.graph.initializers)


def test_external_data_stays_external(bert, tmp_path):
    bert = onnx.ModelProto.FromString(bert.SerializeToString())  # onnx.save_model changes what it is given
    onnx.save_model(bert, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=64)
    host = OnnxHost.from_model(tmp_path / "m.onnx")
    result = fused(host)
    (tmp_path / "out").mkdir()
    result.save(tmp_path / "out" / "m.onnx", {})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["m.onnx", "m.onnx.data"]
    named = host.example_inputs()
    torch.testing.assert_close(
        OnnxHost.from_model(tmp_path / "out" / "m.onnx").runner()(named), host.runner()(named), atol=1e-4, rtol=1e-4
    )
    (tmp_path / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes()[:-100])
    with pytest.raises(UnreadableModel, match=r"'w.bin' is cut off"):
        OnnxHost.from_model(tmp_path / "m.onnx")
    (tmp_path / "w.bin").unlink()
    with pytest.raises(UnreadableModel, match="which is not there"):
        OnnxHost.from_model(tmp_path / "m.onnx")


@pytest.mark.parametrize("cut", [0, 1, 17, 1000, 20_000])
def test_truncated_files(bert, tmp_path, cut):
    path = tmp_path / "m.onnx"
    whole = bert.SerializeToString()
    path.write_bytes(whole[:cut] if cut < 1000 else whole[:-cut])
    with pytest.raises(UnreadableModel) as raised:
        OnnxHost.from_model(path)
    assert str(path) in raised.value.message
    assert raised.value.next_move


@pytest.mark.parametrize("content", [b"", b"hello, world", b"PK\x03\x04" + b"0" * 100, bytes(range(256)) * 20])
def test_files_that_are_not_onnx(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(UnreadableModel):
        OnnxHost.from_model(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UnreadableModel, match="there is no file"):
        OnnxHost.from_model(tmp_path / "m.onnx")
    with pytest.raises(UnreadableModel, match="is a folder"):
        OnnxHost.from_model(tmp_path)


def test_dangling_input():
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = helper.make_node("Add", ["x", "nowhere"], ["y"], name="sum")
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([node], "g", [x], [out]), opset_imports=[helper.make_opsetid("", 17)])
    with pytest.raises(UnreadableModel, match="'nowhere', read by node 'sum', is made by nothing"):
        OnnxHost.from_model(model)


@pytest.mark.parametrize("opset", [12, 26])
def test_opsets_out_of_range(opset):
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [out])
    with pytest.raises(UnsupportedFormat, match=f"opset {opset}; attnopt reads 13 to 25"):
        OnnxHost.from_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]))


@pytest.mark.parametrize("opset", [13, 14, 17])
def test_old_opsets(opset):
    host = OnnxHost.from_model(export("bert", "eager", "torchscript", opset))
    assert host.opset == opset
    named = tensors(hf_models.inputs("bert"))
    torch.testing.assert_close(fused(host).runner()(named), host.runner()(named), atol=1e-4, rtol=1e-4)


def test_unwritable_places(bert, tmp_path):
    host = OnnxHost.from_model(bert)
    with pytest.raises(OutputNotWritable, match="there is no folder"):
        host.save(tmp_path / "missing" / "m.onnx", {})
    with pytest.raises(OutputNotWritable, match="is a folder"):
        host.save(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_inputs_are_checked(bert):
    call = OnnxHost.from_model(bert).callable()
    ids, mask = np.ones((2, 5), dtype=np.int64), np.ones((2, 5), dtype=np.int64)
    by_name, by_place = call({"input_ids": ids, "attention_mask": mask}), call(ids, mask)
    assert all(isinstance(a, np.ndarray) and np.array_equal(a, b) for a, b in zip(by_name, by_place, strict=True))
    for inputs, said in [
        ({"input_ids": ids}, "input 'attention_mask' is missing"),
        ({"input_ids": ids, "attention_mask": mask, "more": mask}, "the model has no input 'more'"),
        ({"input_ids": ids.astype(np.float32), "attention_mask": mask}, r"input 'input_ids' is float32\[2, 5\]"),
        ({"input_ids": ids[0], "attention_mask": mask}, r"input 'input_ids' is int64\[5\]"),
    ]:
        with pytest.raises(InputMismatch, match=said):
            call(inputs)


def test_example_inputs_are_valid_tokens(bert):
    host = OnnxHost.from_model(bert)
    made = host.example_inputs()
    assert made["input_ids"].shape == made["attention_mask"].shape == (2, 16)
    assert int(made["input_ids"].max()) < hf_models.VOCABULARY
    assert made["attention_mask"].min() == 1
    assert all(torch.isfinite(t).all() for t in host.runner()(made))


def test_subgraphs_keep_what_they_read():
    """The branches of an If read a value of the outer graph: it must not be removed."""
    proto = export("bert", "eager", "torchscript")
    outer = proto.graph.output[0].name
    then = helper.make_graph(
        [helper.make_node("Identity", [outer], ["a"])], "then", [], [helper.make_empty_tensor_value_info("a")]
    )
    other = helper.make_graph([helper.make_node("Neg", [outer], ["b"])], "else", [], [helper.make_empty_tensor_value_info("b")])
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "flag"))
    model.graph.node.append(helper.make_node("If", ["flag"], ["branched"], then_branch=then, else_branch=other, name="if"))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("branched", onnx.TensorProto.FLOAT, None))
    host = OnnxHost.from_model(model)
    result = fused(host)
    assert operators(result).count("MultiHeadAttention") == 2
    named = tensors(hf_models.inputs("bert"))
    torch.testing.assert_close(result.runner()(named), host.runner()(named), atol=1e-4, rtol=1e-4)
