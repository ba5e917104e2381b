"""Nodes of a graph priced one by one, and the sum over a model."""

from __future__ import annotations

import pytest
from toy_target import TOY

from attnopt.cost.estimate import NOTHING, estimate_linear
from attnopt.cost.nodes import attention_shape, bytes_of, estimate_node, estimate_nodes, estimate_rest
from attnopt.ir.dims import symbol
from attnopt.ir.graph import Graph, Value
from attnopt.patterns import recognise

ROWS = symbol("rows")
SIZES = {"rows": 8, "batch": 2, "length": 16}


def value(name, *shape, dtype="float32", constant=False, view=False):
    return Value(name, shape, dtype, load=(lambda: None) if constant else None, handle=None if view else name)


def node(op, inputs, output, **attrs):
    return Graph().add(op, tuple(inputs), (output,), name=op, **attrs)


def test_a_linear_layer_and_a_product_of_two_tensors():
    layer = node("linear", [value("x", ROWS, 64), value("w", 32, 64, constant=True), None], value("y", ROWS, 32))
    assert estimate_node(layer, SIZES, TOY) == estimate_linear(8, 64, 32, target=TOY)
    narrow = estimate_nodes([layer], SIZES, TOY, weights={"linear": "int8"})
    assert narrow.seconds == estimate_linear(8, 64, 32, weights="int8", target=TOY).seconds
    product = node("matmul", [value("a", 2, 3, ROWS, 64), value("b", 2, 3, 64, 5)], value("c", 2, 3, ROWS, 5))
    made = estimate_node(product, SIZES, TOY)
    assert made.flops == 2 * 6 * 8 * 64 * 5
    assert made.bytes == 4 * 6 * (8 * 64 + 64 * 5 + 8 * 5)


def test_views_cost_nothing_and_passes_move_what_they_read():
    assert estimate_node(node("reshape", [value("x", ROWS, 4)], value("y", 4, ROWS)), SIZES, TOY) == NOTHING
    turned = node("permute", [value("x", ROWS, 40)], value("y", 40, ROWS), perm=(1, 0))
    assert estimate_node(turned, SIZES, TOY) == NOTHING
    assert estimate_node(turned, SIZES, TOY, "onnxruntime").bytes == 2 * 4 * 8 * 40
    added = node("add", [value("x", ROWS, 40), value("one", 1, constant=True)], value("y", ROWS, 40))
    assert estimate_node(added, SIZES, TOY).bytes == 2 * 4 * 8 * 40
    inside = node("add", [value("x", ROWS, 40)], value("y", ROWS, 40, view=True))
    assert estimate_node(inside, SIZES, TOY) == NOTHING  # a part of another node of the host


def test_an_unknown_size_costs_its_launch():
    unknown = node("exp", [value("x", symbol("chunks"))], value("y", symbol("chunks")))
    assert estimate_node(unknown, SIZES, TOY).seconds == pytest.approx(1e-6)
    assert bytes_of(value("x", symbol("chunks")), SIZES) == 0
    assert bytes_of(value("x", ROWS, dtype="int64"), SIZES) == 64


def test_an_attention_that_is_one_node():
    q, k = value("q", 2, 8, ROWS, 64), value("k", 2, 4, 100, 64)
    fused = node("attention", [q, k, value("v", 2, 4, 100, 32), None], value("y", 2, 8, ROWS, 32), causal=True, scale=1.0)
    assert attention_shape(fused, SIZES) == {"b": 2, "h": 8, "g": 4, "q": 8, "k": 100, "d": 64, "e": 32}
    assert estimate_node(fused, SIZES, TOY).flops > 2 * 2 * 8 * 8 * 8 * 96


def test_a_model_is_its_attentions_and_the_rest():
    from hosts.onnx import small_models

    from attnopt.hosts.onnx import OnnxHost

    graph = OnnxHost.from_model(small_models.spelled_out()).graph
    sites = recognise(graph).sites
    whole = estimate_nodes(graph.nodes, SIZES, TOY, runtime="onnxruntime")
    rest = estimate_rest(graph, sites, SIZES, TOY, runtime="onnxruntime")
    assert rest == NOTHING  # the model is one attention
    assert whole.flops >= 2 * 2 * 2 * 4 * 16 * 16 * 8
    assert "of the time is bound by" in whole.why
