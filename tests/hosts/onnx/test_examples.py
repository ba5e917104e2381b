"""Made-up inputs are ones the model can run."""

from __future__ import annotations

import torch
from hosts.onnx import small_models
from hosts.onnx.small_models import INT64, value
from onnx import helper

from attnopt.hosts.onnx import OnnxHost


def test_sums_of_symbols_are_computed():
    """What decoders with a cache declare: the mask is as long as the past and the new tokens together."""
    nodes = [
        helper.make_node("Concat", ["past", "x"], ["all"], axis=1),
        helper.make_node("Mul", ["all", "mask"], ["y"]),
    ]
    inputs = [value("mask", ["batch", "past + new"]), value("past", ["batch", "past"]), value("x", ["batch", "new"])]
    host = OnnxHost.from_model(small_models.model(nodes, inputs))
    made = host.example_inputs()
    assert made["mask"].shape == (2, 32)
    assert torch.isfinite(host.runner()(made)[0]).all()


def test_a_float_mask_is_ones():
    node = helper.make_node("Mul", ["x", "attention_mask"], ["y"])
    host = OnnxHost.from_model(small_models.model([node], [value("x", ["n", 4]), value("attention_mask", ["n", 4])]))
    assert host.example_inputs()["attention_mask"].unique().tolist() == [1.0]


def test_positions_count_and_text_that_is_no_sum_is_one_symbol():
    nodes = [helper.make_node("Cast", [n], [f"{n}_float"], to=1) for n in ("position_ids", "other")]
    nodes.append(helper.make_node("Mul", ["position_ids_float", "other_float"], ["y"]))
    inputs = [value("position_ids", ["batch", "max(1, n)"], INT64), value("other", ["batch", "max(1, n)"], INT64)]
    made = OnnxHost.from_model(small_models.model(nodes, inputs)).example_inputs()
    assert made["position_ids"][0].tolist() == list(range(16))
    assert made["other"].shape == (2, 16)
