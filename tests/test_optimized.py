"""What `optimize` returns: written as .pt2 and .onnx, read back with the report inside, and nothing left behind on failure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hosts.onnx import small_models
from self_attention import SelfAttention, example
from torch import nn

import attnopt
from attnopt.errors import AccuracyError, InputMismatch, OutputNotWritable, PlanError, UnsupportedFormat
from attnopt.plan.options import groups
from attnopt.runtime.dynamic_int8 import quantize_weight


@pytest.fixture(scope="module")
def model():
    return SelfAttention().eval()


@pytest.fixture(scope="module")
def fast(model):
    return attnopt.optimize(model, example(), select="always")


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_round_trip(model, fast, tmp_path, suffix):
    path = fast.export(tmp_path / f"fast{suffix}")
    assert [p.name for p in tmp_path.iterdir()] == [f"fast{suffix}"]
    loaded = attnopt.load(path)
    assert loaded.report["fused"] == 1
    assert loaded.report["sites"][0]["before"] == fast.report.sites[0].before
    named = example(3, 9)
    got, wanted = loaded(**named), model(**named)
    outputs = got.values() if suffix == ".pt2" else map(torch.from_numpy, got)
    for a, b in zip(outputs, wanted.values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


class Named(nn.Module):
    def forward(self, input, shift=None, factor=None, power=2.0, *, bias):
        shifted = input if shift is None else input + shift
        return shifted * factor**power + bias


def test_saved_models_are_called_as_before(model, fast, tmp_path):
    x, seen = example(3, 9).values()
    loaded = attnopt.load(fast.export(tmp_path / "m.pt2"))
    for got in (loaded(x, seen), loaded(x, seen=seen), loaded(seen=seen, x=x)):
        torch.testing.assert_close(got, model(x, seen), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputMismatch, match="'seen' is missing"):
        loaded(x)
    with pytest.raises(InputMismatch, match="too many positional"):
        loaded(x, seen, True)


def test_parameters_that_were_not_traced_keep_their_place(tmp_path):
    """factor must not land on shift."""
    x, factor, bias = (torch.rand(4, 3) + 0.5 for _ in range(3))
    fast = attnopt.optimize(Named(), {"input": x, "factor": factor, "bias": bias})
    loaded, wanted = attnopt.load(fast.export(tmp_path / "m.pt2")), Named()(x, None, factor, bias=bias)
    torch.testing.assert_close(loaded(x, None, factor, bias=bias), wanted)
    torch.testing.assert_close(loaded(x, None, factor, 2.0, bias=bias), wanted)
    with pytest.raises(InputMismatch, match="'shift' was not among the example inputs"):
        loaded(x, factor, bias=bias)
    with pytest.raises(InputMismatch, match="too many positional"):
        loaded(x, None, factor, 2.0, bias)


def test_onnx_files_keep_names_and_open_sizes(fast, tmp_path):
    graph = onnx.load(fast.export(str(tmp_path / "fast.onnx"))).graph
    assert ([i.name for i in graph.input], [o.name for o in graph.output]) == (["x", "seen"], ["hidden", "first"])
    assert "MultiHeadAttention" in {node.op_type for node in graph.node}
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert shapes["x"][:2] == shapes["seen"]
    assert all(isinstance(size, str) for size in shapes["seen"])


def test_without_passes_a_file_holds_what_torch_exports(model, tmp_path):
    plain = attnopt.optimize(model, example(), passes=[])
    path = plain.export(tmp_path / "plain.onnx")
    held = {node.op_type for node in onnx.load(path).graph.node}
    assert "Softmax" in held
    assert not held & {"MultiHeadAttention", "GroupQueryAttention", "Attention"}
    assert attnopt.load(path).plan.kernels == {}


def test_onnx_in_onnx_out(tmp_path):
    fast = attnopt.optimize(small_models.spelled_out(), select="always")
    arrays = {name: np.random.default_rng(0).standard_normal((3, 4, 5, 8)).astype(np.float32) for name in "qkv"}
    wanted = fast(**arrays)
    for got in (attnopt.load(fast.export(tmp_path / "m.onnx"))(arrays), fast(*arrays.values())):
        assert np.array_equal(got[0], wanted[0])


def test_files_of_others_have_no_report(tmp_path):
    onnx.save(small_models.spelled_out(), tmp_path / "m.onnx")
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "m.pt2")
    assert attnopt.load(tmp_path / "m.onnx").report is None
    assert attnopt.load(tmp_path / "m.pt2").report is None


def test_int8_layers_are_carried_over(model, tmp_path):
    fast = attnopt.optimize(model, example(8, 12), budget=0.05, select="always", passes=["dynamic-int8"])
    assert [r.name for r in fast.report.rewrites if r.kept] == ["dynamic-int8"]
    named = example(3, 9)
    wanted = fast(**named)["hidden"]
    assert 0 < (wanted - model(**named)["hidden"]).abs().max() < 0.05
    torch.testing.assert_close(attnopt.load(fast.export(tmp_path / "m.pt2"))(**named)["hidden"], wanted)
    path = fast.export(tmp_path / "m.onnx")
    assert len([n for n in onnx.load(path).graph.node if n.op_type == "MatMulInteger"]) == 4
    assert (torch.from_numpy(attnopt.load(path)(**named)[0]) - wanted).abs().max() < 0.05
    assert attnopt.load(path).report["rewrites"][0]["kept"]


@pytest.mark.parametrize("name", ["round-weights", "gptq", "quest-rounding"])
def test_layers_in_few_bits_are_carried_over(model, tmp_path, name):
    fast = attnopt.optimize(model, example(8, 12), budget=0.2, select="always", passes=[name])
    assert [r.name for r in fast.report.rewrites if r.kept] == [name]
    path = fast.export(tmp_path / "m.onnx")
    assert len([n for n in onnx.load(path).graph.node if n.op_type == "MatMulNBits"]) == 4


def test_an_int8_file_is_held_to_the_torch_model_or_else_to_the_budget(monkeypatch, caplog, model, tmp_path):
    """A runtime that rounds alike needs no budget; one that does not is held to it on the example inputs, and a line says so."""
    fast = attnopt.optimize(model, example(8, 12), budget=0.05, select="always", passes=["dynamic-int8"])
    fast.report = replace(fast.report, budget=1e-9)
    fast.export(tmp_path / "m.onnx")
    assert "rounds otherwise" not in caplog.text

    def off(weight):
        codes, scales = quantize_weight(weight)
        return codes, 1.02 * scales

    monkeypatch.setattr("attnopt.hosts.onnx.int8.quantize_weight", off)
    with pytest.raises(AccuracyError):
        fast.export(tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()
    fast.report = replace(fast.report, budget=0.05)
    fast.export(tmp_path / "other.onnx")
    assert "onnxruntime rounds otherwise than torch: on the example inputs the file loses" in caplog.text


def test_a_file_that_computes_something_else_is_not_written(monkeypatch, fast, tmp_path):
    monkeypatch.setattr("attnopt.optimized.apply_choices", lambda host, chosen: negated(host))
    with pytest.raises(AccuracyError):
        fast.export(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def negated(host):
    """The same graph with its first output negated."""
    copy = host.copy()
    output = copy.graph.outputs[0]
    builder = copy.builder(output.producer)
    same = builder.emit(output.producer.op, *output.producer.inputs, shape=output.shape, **output.producer.attrs)
    copy.replace(output, builder.emit("neg", same, shape=output.shape, dtype=output.dtype))
    copy.finish()
    return copy


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("m.txt", UnsupportedFormat, "cannot write a torch model as '.txt'"),
        ("m", UnsupportedFormat, "cannot write a torch model as ''"),
        ("absent/m.pt2", OutputNotWritable, "there is no folder"),
        ("absent/m.onnx", OutputNotWritable, "there is no folder"),
        ("folder.pt2", OutputNotWritable, "folder.pt2"),
        ("folder.onnx", OutputNotWritable, "is a folder"),
    ],
)
def test_places_that_cannot_be_written(fast, tmp_path, name, error, says):
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(error, match=says):
        fast.export(tmp_path / name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["folder.onnx", "folder.pt2"]


def test_onnx_models_are_not_written_as_pt2(tmp_path):
    fast = attnopt.optimize(small_models.spelled_out(), select="always")
    with pytest.raises(UnsupportedFormat, match=r"cannot write a onnx model as '.pt2'"):
        fast.export(tmp_path / "m.pt2")


def test_a_linear_layer_that_onnx_does_not_have(monkeypatch, model, tmp_path):
    """int8 layers are matched in order: where their number differs, nothing is guessed."""
    fast = attnopt.optimize(model, example(8, 12), budget=0.05, select="always", passes=["dynamic-int8"])
    seen = groups.linears_of
    monkeypatch.setattr(groups, "linears_of", lambda graph: list(seen(graph))[: 4 if graph is fast._opened.host.graph else 3])
    with pytest.raises(PlanError, match="has 3 linear layers where the torch model has 4"):
        fast.export(tmp_path / "m.onnx")


class Windowed(nn.Module):
    """Grouped heads, a window of 64: on the CPU local attention is several times as fast as GroupQueryAttention."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 128)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in self.qkv(x).split((64, 32, 32), -1))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        place = torch.arange(x.shape[1])
        behind = place[:, None] - place[None, :]
        scores = (q @ k.transpose(-1, -2) / 4).masked_fill((behind < 0) | (behind >= 64), -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_a_file_for_onnxruntime_has_the_kernel_that_measures_fastest_there(tmp_path):
    model, x = Windowed().eval(), torch.randn(1, 2048, 64)
    fast = attnopt.optimize(model, (x,), select="always")
    fast.report = replace(fast.report, select="measure")  # without the time that measuring torch's kernels takes
    path = fast.export(tmp_path / "m.onnx")
    assert not {n.op_type for n in onnx.load(path).graph.node} & {"GroupQueryAttention", "Attention"}
    torch.testing.assert_close(torch.from_numpy(attnopt.load(path)(x)[0]), model(x), atol=1e-5, rtol=1e-5)
