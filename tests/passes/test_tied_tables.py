"""A table that is tied to a layer is looked up in the layer's codes, in both hosts, and no float form of it stays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hosts.onnx import small_models
from onnx import TensorProto, helper
from torch import nn

from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.fx.int8 import constant
from attnopt.hosts.onnx import OnnxHost
from attnopt.passes import DynamicInt8, Gptq, RoundWeights
from attnopt.passes.weight_rounding import Wish
from attnopt.plan.arrays import Arrays
from attnopt.plan.memory.memory import freed
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import Move
from attnopt.runtime.dynamic_int8 import quantize_weight

ROWS, CHANNELS = 100, 96
IDS = torch.randint(0, ROWS, (3, 5), generator=torch.Generator().manual_seed(0))
TABLE = np.random.default_rng(0).standard_normal((ROWS, CHANNELS)).astype(np.float32)


class Tied(nn.Module):
    """Rows of a table, times the table, and the rows themselves."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(ROWS, CHANNELS)
        self.table.weight.data = torch.from_numpy(TABLE.copy())

    def forward(self, ids):
        rows = self.table(ids)
        return nn.functional.linear(torch.relu(rows), self.table.weight), rows


def opened(kind, more=()):
    if kind == "torch":
        return FxHost.from_captured(capture(Tied().eval(), (IDS,)))
    nodes = [
        helper.make_node("Gather", ["t", "ids"], ["rows"], name="look"),
        helper.make_node("Relu", ["rows"], ["up"], name="relu"),
        helper.make_node("Transpose", ["t"], ["turned"], perm=[1, 0], name="turn"),
        helper.make_node("MatMul", ["up", "turned"], ["y"], name="head"),
        *more,
    ]
    outputs = ["y", "rows", *(n.output[0] for n in more)]
    return OnnxHost.from_model(
        small_models.model(nodes, [small_models.value("ids", ["b", "l"], TensorProto.INT64)], outputs, {"t": TABLE})
    )


def head(host):
    return next(g for g in Grouping(host, ()).of("linear") if g.linears)


def changed(host, candidate, rewrite):
    copy = host.copy()
    rewrite.apply(candidate, replace(head(copy), host=copy))
    copy.finish()
    return copy


def floats(host):
    """Numbers in float32 constants that a graph reads."""
    if isinstance(host, OnnxHost):
        return sum(v.const_value.size for v in host.model.graph.initializers.values() if v.dtype == 1)
    read = {n.target: constant(host.module, n) for n in host.module.graph.nodes if n.op == "get_attr"}
    return sum(x.numel() for x in read.values() if x.dtype == torch.float32)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_the_rows_are_those_of_the_layer(kind, smoothed):
    host, rewrite = opened(kind), DynamicInt8()
    (name,) = host.example_inputs()
    group = head(host)
    (candidate,) = rewrite.propose(group, None)
    assert candidate.description == "the linear layer in int8, and the tied table is read from the codes"
    assert [n.op for n in candidate.nodes] == ["linear", "gather"]
    factors = torch.exp2(torch.arange(CHANNELS) % 3 - 1.0) if smoothed else torch.ones(CHANNELS)
    if smoothed:
        powers = factors.log2().int().tolist()
        candidate = replace(candidate, options={"exponents": powers, "fold": False})
    copy = changed(host, candidate, rewrite)
    codes, steps = quantize_weight(torch.from_numpy(TABLE) * factors)
    table = codes * steps[:, None] / factors
    got, rows = copy.runner()({name: IDS})
    torch.testing.assert_close(rows, table[IDS], rtol=1e-6, atol=1e-6)
    wanted = torch.relu(table[IDS]) @ table.T
    assert 1e-5 < float((got - wanted).norm() / wanted.norm()) < 0.02
    assert floats(copy) < ROWS * CHANNELS / 8  # steps, no table
    torch.testing.assert_close(host.runner()({name: IDS})[1], torch.from_numpy(TABLE)[IDS], atol=0, rtol=0)
    assert freed([Move(rewrite, group, candidate)]) == 0.75 * 4 * ROWS * CHANNELS


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("wish", [Wish(8, 32), Wish(4, 32), Wish(8, 32, True), Wish(3, 32)])
def test_rounded_layers_share_their_codes_too(kind, wish):
    host, rewrite = opened(kind), RoundWeights(wishes=(wish,))
    (name,) = host.example_inputs()
    (candidate,) = rewrite.propose(head(host), None)
    assert candidate.description.endswith("rounded to the nearest, and the tied table is read from the codes")
    copy = changed(host, candidate, rewrite)
    table = rewrite.gridding.rounded(torch.from_numpy(TABLE), wish.format(CHANNELS)).matrix()
    got, rows = copy.runner()({name: IDS})
    torch.testing.assert_close(rows, table[IDS], rtol=1e-5, atol=1e-6)
    wanted = torch.relu(table[IDS]) @ table.T
    assert float((got - wanted).norm() / wanted.norm()) < 0.02
    assert floats(copy) == ROWS * CHANNELS / 32  # one step for each group, once
    width = wish.format(CHANNELS).width(CHANNELS)
    assert freed([Move(rewrite, head(host), candidate)]) == (32 - width) * ROWS * CHANNELS / 8


def test_packed_zero_points_are_not_shared_where_the_runtime_cannot_read_them():
    host, rewrite = opened("onnx"), RoundWeights(wishes=(Wish(4, 32, True),))
    (candidate,) = rewrite.propose(head(host), None)
    assert "but the tied table stays in float: zero points of 4 bits are packed across blocks" in candidate.description
    copy = changed(host, candidate, rewrite)
    np.testing.assert_array_equal(copy.runner()({"ids": IDS})[1].numpy(), TABLE[IDS.numpy()])


def test_the_file_is_smaller_and_plain_onnxruntime_runs_it(tmp_path):
    host, rewrite = opened("onnx"), DynamicInt8()
    copy = changed(host, rewrite.propose(head(host), None)[0], rewrite)
    host.save(tmp_path / "float.onnx", {})
    copy.save(tmp_path / "codes.onnx", {})
    before, after = (p.stat().st_size for p in (tmp_path / "float.onnx", tmp_path / "codes.onnx"))
    assert before > 4 * ROWS * CHANNELS and after < 0.4 * before
    assert [t.name for t in onnx.load(tmp_path / "codes.onnx").graph.initializer].count("t") == 0
    session = onnxruntime.InferenceSession(tmp_path / "codes.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {"ids": IDS.numpy()})
    np.testing.assert_allclose(got[1], copy.runner()({"ids": IDS})[1].numpy(), rtol=1e-6)


def test_a_table_that_something_else_reads_stays_in_float():
    host, rewrite = opened("onnx", [helper.make_node("Relu", ["t"], ["all"], name="other")]), DynamicInt8()
    (candidate,) = rewrite.propose(head(host), None)
    assert candidate.description == "the linear layer in int8, but the tied table stays in float: relu reads the table too"
    copy = changed(host, candidate, rewrite)
    np.testing.assert_array_equal(copy.runner()({"ids": IDS})[1].numpy(), TABLE[IDS.numpy()])
    assert freed([Move(rewrite, head(host), candidate)]) < 0  # codes beside the table


def test_codes_that_data_are_needed_for_are_those_of_the_layer_alone():
    host, rewrite = opened("onnx"), Gptq(wishes=(Wish(4, 32),))
    (name,) = host.example_inputs()
    group = head(host)
    evidence = Evidence(host, Calibration.of(host.graph, [{name: IDS}]), sites=())
    (candidate,) = rewrite.propose(group, evidence)
    (ready,) = Arrays(evidence).ready([Move(rewrite, group, candidate)])
    assert ready.candidate.arrays.keys() == {"head"} and candidate.touches == {"head", "look"}
    copy = changed(host, ready.candidate, rewrite)
    assert floats(copy) == ROWS * CHANNELS / 32
