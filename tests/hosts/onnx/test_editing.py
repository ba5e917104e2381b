"""Replacing, tapping and cutting out where the ONNX graph has no node of its own for what is asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hosts.onnx import small_models
from hosts.onnx.small_models import value
from onnx import helper

from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.dims import symbol
from attnopt.ir.site import NotIsolated
from attnopt.patterns import recognise
from attnopt.plan.choose import apply_choices, choose

APART, FLAT = ("batch", 4, "length", 8), ("batch", "length", 96)
HEADS = {"q_num_heads": 4, "kv_num_heads": 4}
ATTENTIONS = {
    "spelled_out": (small_models.spelled_out(), "MultiHeadAttention"),
    "heads_apart": (small_models.attention(23, APART), "MultiHeadAttention"),
    "heads_in_a_row": (small_models.attention(24, FLAT, **HEADS), "MultiHeadAttention"),
    "fewer_keys_heads": (
        small_models.attention(24, FLAT, ("batch", "length", 48), is_causal=1, q_num_heads=4, kv_num_heads=2),
        "GroupQueryAttention",
    ),
    "mask": (small_models.attention(23, APART, mask=(1, 1, "length", "length")), "MultiHeadAttention"),
}


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("select", ["always", "measure"])
def test_an_attention_that_is_the_output(name, select):
    """The output keeps its name though another node makes it."""
    proto, kernel = ATTENTIONS[name]
    host = OnnxHost.from_model(proto)
    named = host.example_inputs()
    sites = recognise(host.graph).sites
    assert len(sites) == 1
    result = apply_choices(host, choose(host, sites, named, runtime="onnxruntime", opset=host.opset, select=select))
    if select == "always":
        assert kernel in [n.op_type for n in result.model.graph]
    assert result.output_names == host.output_names == ["y"]
    assert [n.op_type for n in host.model.graph if n.domain] == []
    for batch, length in ((2, 16), (3, 5)):
        other = {n: torch.randn([{2: batch, 16: length}.get(s, s) for s in t.shape]) for n, t in named.items()}
        if name == "mask":
            other["m"] = torch.randn(1, 1, length, length)
        torch.testing.assert_close(result.runner()(other), host.runner()(other), atol=1e-4, rtol=1e-4)


NOT_READ = {
    "other_precision": small_models.attention(23, APART, softmax_precision=11),
    "mask_over_the_first_keys": small_models.attention(24, (2, 4, 6, 8), mask=(2, 1, 6, 4)),
    "mask_over_perhaps_the_first_keys": small_models.attention(24, APART, mask=("batch", 1, "length", "first")),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_attention_with_more_than_the_vocabulary_says_stays(name):
    graph = OnnxHost.from_model(NOT_READ[name]).graph
    assert [(n.op, n.attrs["operator"]) for n in graph.nodes] == [("opaque", "Attention")]


def test_own_precision_is_no_other_precision():
    assert [n.op for n in OnnxHost.from_model(small_models.attention(23, APART, softmax_precision=1)).graph.nodes] == [
        "attention"
    ]


def test_tap_of_what_only_the_canonical_graph_has():
    host = OnnxHost.from_model(small_models.attention(24, FLAT, **HEADS))
    named = host.example_inputs()
    attention = next(host.graph.of("attention"))
    scale = OnnxHost.from_model(small_models.spelled_out()).graph.nodes[2].inputs[1]
    q, made, again = host.tap([attention.inputs[0], attention.output, attention.inputs[0]], named)
    torch.testing.assert_close(q, named["q"].reshape(2, 16, 4, 24).transpose(1, 2))
    torch.testing.assert_close(again, q)
    torch.testing.assert_close(made.transpose(1, 2).flatten(2), host.runner()(named)[0], atol=1e-5, rtol=1e-5)
    assert [n.op_type for n in host.model.graph] == ["Attention"]
    host = OnnxHost.from_model(small_models.spelled_out())
    (held,) = host.tap([scale], host.example_inputs())
    assert held.item() == pytest.approx(8**-0.5)
    given = {"q": torch.ones(2, 4, 3, 8)}
    assert host.tap([host.graph.inputs[0]], given)[0] is given["q"]


def test_a_branch_is_not_cut_out():
    """Its subgraphs read values of the whole graph."""
    branches = {
        f"{name}_branch": helper.make_graph([helper.make_node(op, ["z"], [name])], name, [], [value(name, None)])
        for name, op in (("then", "Neg"), ("else", "Abs"))
    }
    nodes = [
        helper.make_node("Relu", ["x"], ["z"], name="before"),
        helper.make_node("If", ["flag"], ["y"], name="if", **branches),
    ]
    host = OnnxHost.from_model(small_models.model(nodes, [value("x", ["n"])], weights={"flag": np.array(True)}))
    branch = next(host.graph.of("opaque"))
    assert host.graph.nodes[0].output in branch.inputs
    with pytest.raises(NotIsolated, match=r"'if' \(If\) has a graph of its own"):
        host.isolate([host.graph.nodes[0].output], [branch.output])


@pytest.mark.parametrize("opset", [13, 17, 18, 23])
@pytest.mark.parametrize(
    ("op", "inputs", "shape", "attrs", "wanted"),
    [
        ("iota", 0, ("length",), {"start": 3, "step": -2}, lambda x: 3 - 2 * torch.arange(5)),
        ("iota", 0, (4,), {}, lambda x: torch.arange(4)),
        ("full", 0, ("batch", 2), {"value": 7}, lambda x: torch.full((2, 2), 7)),
        ("reduce_max", 1, ("batch", 4, "length"), {"axes": (3,), "keepdims": False}, lambda x: x.amax(3)),
        ("reduce_mean", 1, ("batch", 4, "length", 1), {"axes": (3,), "keepdims": True}, lambda x: x.mean(3, True)),
        ("reduce_sum", 1, ("batch", 4, 1, 1), {"axes": (2, 3), "keepdims": True}, lambda x: x.sum((2, 3), True)),
        ("reshape", 1, ("batch", "length", 32), {}, lambda x: x.reshape(2, 5, 32)),
        ("expand", 1, (3, "batch", 4, "length", 8), {}, lambda x: x.expand(3, 2, 4, 5, 8)),
        ("slice", 1, ("batch", 4, "length", 3), {"axis": 3, "start": 2, "stop": 5, "step": 1}, lambda x: x[..., 2:5]),
        ("ne", 2, ("batch", 4, "length", 8), {}, lambda x: x != x),
        ("topk", 1, ("batch", 4, "length", 3), {"count": 3}, lambda x: x.topk(3).indices),
    ],
)
def test_operations_at_every_opset(opset, op, inputs, shape, attrs, wanted):
    host = OnnxHost.from_model(small_models.spelled_out(opset))
    q = host.graph.inputs[0]
    kind = {"ne": "bool", "topk": "int64"}.get(op, "float32" if inputs else "int64")
    sizes = tuple(symbol(s) if isinstance(s, str) else s for s in shape)
    made = host.builder(host.graph.nodes[-1]).emit(op, *([q] * inputs), shape=sizes, dtype=kind, **attrs)
    host.model.graph.outputs.append(made.handle)
    host.finish()
    named = {n: torch.randn(2, 4, 5, 8) for n in "qkv"}
    torch.testing.assert_close(host.runner()(named)[1], wanted(named["q"]))


def test_a_weight_that_two_layers_share_is_quantised_for_one():
    nodes = [helper.make_node("MatMul", ["x", "w"], [f"y{i}"], name=f"layer{i}") for i in range(2)]
    weights = {"w": np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)}
    host = OnnxHost.from_model(small_models.model(nodes, [value("x", ["n", 64])], ["y0", "y1"], weights))
    copy = host.copy()
    copy.quantize_linears([copy.graph.nodes[0]])
    named = {"x": torch.randn(3, 64)}
    wanted, got = host.runner()(named), copy.runner()(named)
    assert 0 < (wanted[0] - got[0]).abs().max() < 0.5
    torch.testing.assert_close(wanted[1], got[1])
    assert copy.output_names == ["y0", "y1"]


@pytest.mark.parametrize("axes", [(0, 1), (1, 2), (2, 3)])
def test_general_gathers_are_written(axes):
    """Indices of two axes that broadcast against each other; the result stands where the axes stood."""
    host = OnnxHost.from_model(small_models.spelled_out())
    q = host.graph.inputs[0]
    builder = host.builder(host.graph.nodes[-1])
    first, second = torch.tensor([[1], [0], [-1]]), torch.tensor([[0, 1]])
    indices = [builder.constant(i, "int64") for i in (first, second)]
    shape = (*q.shape[: axes[0]], 3, 2, *q.shape[axes[-1] + 1 :])
    made = builder.emit("index", q, *indices, shape=shape, dtype="float32", axes=axes)
    host.model.graph.outputs.append(made.handle)
    host.finish()
    named = {n: torch.randn(2, 4, 5, 8) for n in "qkv"}
    torch.testing.assert_close(host.runner()(named)[1], named["q"][(slice(None),) * axes[0] + (first, second)])
