"""Tokens counted by the attention they receive: as the model's own weights say, over real tokens, and alike where least is one."""

from __future__ import annotations

import functools

import hf_models
import pytest
import torch

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.concentration import importance
from attnopt.analysis.evidence import Evidence
from attnopt.opening import open_model
from attnopt.patterns import recognise


@functools.cache
def evidence():
    model = hf_models.build("llama")
    batches = [tensors(hf_models.inputs("llama", padding=side, length=n)) for side, n in (("right", 12), ("left", 9))]
    given = open_model(model, {**batches[0], "use_cache": False}, dynamic_shapes=None, need_inputs=True)
    named = [given.host.named_inputs({**b, "use_cache": False}) for b in batches]
    return Evidence(given.host, Calibration.of(given.host.graph, named), sites=recognise(given.host.graph).sites)


def tensors(inputs):
    return {n: x for n, x in inputs.items() if isinstance(x, torch.Tensor)}


def layer_nodes(found):
    return [n for n in found.host.graph.of("linear") if found.linear(n) is not None][:7]


def test_importance_is_relative_to_each_sequence():
    c = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 9.0]], dtype=torch.float64)
    real = torch.tensor([[True, True, True], [True, True, False]])
    r = importance(c, real, 0.5)
    torch.testing.assert_close(r[0], torch.tensor([0.5, 1.0, 0.75], dtype=torch.float64) / 0.75)
    assert r[1].tolist() == [1.0, 1.0, 0.0]
    assert importance(c, None, 0.0).min() == 0.0
    torch.testing.assert_close(importance(c, real, 0.01).sum(1), real.sum(1).double())


def test_all_tokens_alike_is_the_second_moment():
    found = evidence()
    nodes = layer_nodes(found)
    (moments,) = found.concentrated_moments([(found.sites[0], nodes)], 1.0)
    assert moments.keys() == {n.name for n in nodes}
    for node in nodes:
        torch.testing.assert_close(moments[node.name], found.second_moment(node), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("least", [0.5, 0.005])
def test_weights_are_those_of_the_model(least):
    found, model = evidence(), hf_models.build("llama")
    node = layer_nodes(found)[0]
    sums, rows = 0.0, 0
    for given, (x,) in found.hold([node.inputs[0]]):
        with torch.no_grad():
            weights = model(**given, output_attentions=True).attentions[0].double()
        real = given["attention_mask"].bool()
        r = importance((weights * real[:, None, :, None]).sum((1, 2)), real, least)
        sums = sums + torch.einsum("bt,bti,btj->ij", r, x.double(), x.double())
        rows += int((r > 0).sum())
    (moments,) = found.concentrated_moments([(found.sites[0], [node])], least)
    torch.testing.assert_close(moments[node.name], sums / rows, rtol=1e-5, atol=1e-7)


def test_layers_come_in_order_whatever_memory_holds():
    found = evidence()
    small = Evidence(found.host, found.calibration, sites=found.sites, memory=1)
    nodes = layer_nodes(found)
    layers = [(found.sites[0], nodes[:3]), (found.sites[1], nodes[3:5])]
    for one, other in zip(found.concentrated_moments(layers, 0.1), small.concentrated_moments(layers, 0.1), strict=True):
        assert one.keys() == other.keys() and len(one) in (2, 3)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_data_nothing_is_known():
    found = evidence()
    empty = Evidence(found.host, sites=found.sites)
    assert list(empty.concentrated_moments([(found.sites[0], layer_nodes(found))], 0.1)) == [{}]
