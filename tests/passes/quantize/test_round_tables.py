"""round-tables: embeddings in few bits in both hosts; tables that others read, or that no group divides, are left."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hosts.onnx import small_models
from onnx import TensorProto, helper
from torch import nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.passes import RoundTables
from attnopt.passes.weight_rounding import Wish
from attnopt.plan.memory.memory import freed
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import Move

IDS = torch.randint(0, 100, (3, 5), generator=torch.Generator().manual_seed(0))
TABLE = np.random.default_rng(0).standard_normal((100, 96)).astype(np.float32)


class Looked(nn.Module):
    """Rows of a table; a tied model multiplies by the table too."""

    def __init__(self, tied):
        super().__init__()
        self.table, self.tied = nn.Embedding(100, 96), tied
        self.table.weight.data = torch.from_numpy(TABLE.copy())

    def forward(self, ids):
        rows = torch.relu(self.table(ids))
        return nn.functional.linear(rows, self.table.weight) if self.tied else rows


def opened(kind, tied=False):
    if kind == "torch":
        return FxHost.from_captured(capture(Looked(tied).eval(), (IDS,)))
    nodes = [
        helper.make_node("Gather", ["t", "ids"], ["rows"], name="look"),
        helper.make_node("Relu", ["rows"], ["y"], name="relu"),
    ]
    return OnnxHost.from_model(
        small_models.model(nodes, [small_models.value("ids", ["b", "l"], TensorProto.INT64)], ["y"], {"t": TABLE})
    )


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize(
    ("wish", "most"),
    [(Wish(8, 128), 0.01), (Wish(8, 0), 0.01), (Wish(4, 32), 0.15), (Wish(4, 16, True), 0.15), (Wish(2, 16), 0.6)],
)
def test_rows_are_near_and_the_original_stays(kind, wish, most):
    host, rewrite = opened(kind), RoundTables(wishes=(wish,))
    (name,) = host.example_inputs()
    wanted = host.runner()({name: IDS})[0]
    (group,) = Grouping(host, ()).of("model")
    (candidate,) = rewrite.propose(group, None)
    copy = host.copy()
    rewrite.apply(candidate, replace(Grouping(copy, ()).of("model")[0], host=copy))
    copy.finish()
    got = copy.runner()({name: IDS})[0]
    assert got.shape == wanted.shape
    assert most / 100 < float((got - wanted).norm() / wanted.norm()) < most
    torch.testing.assert_close(host.runner()({name: IDS})[0], wanted, atol=0, rtol=0)
    assert freed([Move(rewrite, group, candidate)]) == 9600 * (32 - wish.format(96).width(96)) / 8


def test_what_is_proposed():
    (group,) = Grouping(opened("onnx"), ()).of("model")
    made = RoundTables().propose(group, None)
    assert [c.kind for c in made] == ["int8 row", "int4 group 32 zeros"]
    assert made[1].description == "1 tables as int4 group 32 zeros, rounded to the nearest"
    assert Move(RoundTables(), group, made[0]).narrows


def test_tables_that_a_layer_reads_too_are_left():
    (group,) = Grouping(opened("torch", tied=True), ()).of("model")
    assert RoundTables().propose(group, None).reason == "no table of at least 64 rows and channels that only look-ups read"
    (small,) = Grouping(opened("torch"), ()).of("model")
    assert "100" not in str(RoundTables(smallest=101).propose(small, None))
    said = "no group of 16 to 8 divides rows of 96 channels; 8 do"
    assert RoundTables(wishes=(Wish(4, 8),)).propose(small, None).reason == said


def test_a_step_for_each_row_stands_once():
    """96 channels are no power of two, as the blocks of the operator are: one block is wider than the row."""
    host, rewrite = opened("onnx"), RoundTables(wishes=(Wish(8, 0),))
    (group,) = Grouping(host, ()).of("model")
    copy = host.copy()
    rewrite.apply(rewrite.propose(group, None)[0], replace(Grouping(copy, ()).of("model")[0], host=copy))
    copy.finish()
    (steps,) = [v for v in copy.model.graph.initializers.values() if v.dtype == 1]
    assert list(steps.shape) == [100, 1]
