"""Two narrow layers for one: the identity at full rank, the best of its rank on the data, alike in both hosts, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from shrunk_models import IDS, evidence, host, output, seen

from attnopt.cost.target import load_target
from attnopt.errors import OutOfRange, PlanError
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Refusal
from attnopt.passes import LowRank
from attnopt.passes.factorize.low_rank import factored
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import Move
from attnopt.plan.options.workshop import Workshop

SMALL = LowRank(shares=(0.9, 0.5), multiple=2, smallest=16)


def moves_of(kind, share=0):
    """A move for every group of layers that takes one, with its arrays."""
    given, seen = host("packed", kind), evidence("packed", kind)
    offers = [(g, SMALL.propose(g, seen)) for g in Grouping(given).of("linear")]
    taken = [(g, found[share]) for g, found in offers if not isinstance(found, Refusal)]
    return [Move(SMALL, g, replace(c, arrays=SMALL.arrays(c, g, seen))) for g, c in taken]


def built(kind, share=0):
    given = host("packed", kind)
    shop = Workshop(given, {}, load_target("cpu")[0], "torch", 0, {})
    return shop.edited(given.copy(), moves_of(kind, share), {})


def test_full_rank_is_the_identity_in_float64():
    torch.manual_seed(0)
    for shape in ((12, 20), (20, 12)):
        weight, x = torch.randn(shape).double(), torch.randn(100, shape[1]).double()
        down, up = factored(weight, x.mT @ x / 100, 12)
        torch.testing.assert_close(up @ down, weight, atol=1e-10, rtol=1e-10)


def test_nothing_of_its_rank_is_nearer_on_the_data():
    """For inputs of few directions that rank is enough, where the truncated weight itself loses much."""
    torch.manual_seed(0)
    weight, few = torch.randn(16, 24).double(), torch.randn(100, 4).double() @ torch.randn(4, 24).double()
    x = few + 0.01 * torch.randn(100, 24)
    down, up = factored(weight, x.mT @ x / 100, 4)
    u, s, v = torch.linalg.svd(weight)
    plain = u[:, :4] * s[:4] @ v[:4]
    lost = [float((x @ (weight - w).mT).norm() / (x @ weight.mT).norm()) for w in (up @ down, plain)]
    assert lost[0] < 0.02 and lost[1] > 0.3
    whole = x @ weight.mT
    best = torch.linalg.svd(whole)[1][4:].square().sum().sqrt() / whole.norm()  # Eckart and Young
    assert lost[0] == pytest.approx(float(best), rel=1e-9)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_less_is_computed_and_lower_ranks_lose_more(kind):
    given, made = host("packed", kind), [built(kind, share) for share in (0, 1)]
    lost = [float((output(m) - output(given)).norm() / output(given).norm()) for m in made]
    assert 1e-4 < lost[0] < lost[1]

    def numbers(of):
        layers = [n.inputs[1].shape for n in of.graph.of("linear", "matmul") if n.inputs[1].is_constant]
        return sum(a * b for a, b in layers)

    assert numbers(made[1]) < 0.55 * numbers(given) and numbers(made[0]) < 0.9 * numbers(given)
    assert len(Grouping(made[1]).sites) == 2


def test_both_hosts_compute_the_same():
    torch.testing.assert_close(output(built("torch", 1)), output(built("onnx", 1)), atol=2e-4, rtol=2e-4)


def test_a_head_that_is_the_embedding_as_onnx_holds_it():
    """A table that is turned in front of a product is a layer [out, in] on more than two dimensions, which ONNX has no operator for."""
    torch.manual_seed(0)
    table, layer = torch.randn(48, 32), torch.randn(32, 32) / 6
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "layer"], ["hidden"]),
        helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["hidden", "turned"], ["logits"]),
    ]
    ends = [("input_ids", TensorProto.INT64, ["batch", "length"]), ("logits", TensorProto.FLOAT, ["batch", "length", 48])]
    held = [numpy_helper.from_array(x.numpy(), name) for name, x in (("table", table), ("layer", layer))]
    graph = helper.make_graph(nodes, "tied", *([helper.make_tensor_value_info(*end)] for end in ends), held)
    given = OnnxHost.from_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    ids = {"input_ids": IDS % 48}
    data, made = seen(given, ids), given.copy()
    group, twin = (next(g for g in Grouping(x).of("linear") if g.linears[0].op == "linear") for x in (given, made))
    offer = SMALL.propose(group, data)[1]
    arrays = SMALL.arrays(offer, group, data)
    SMALL.apply(replace(offer, arrays=arrays), twin)
    made.finish()
    (down, up) = (x.double() for x in next(iter(arrays.values())).values())
    wanted = (table[ids["input_ids"]] @ layer).double() @ (up @ down).mT
    torch.testing.assert_close(made.runner()(ids)[0].double(), wanted, atol=1e-4, rtol=1e-4)
    assert next(made.graph.of("gather")).inputs[0].shape == (48, 32)  # the table stays


def test_what_cannot_be_is_refused():
    group, seen = Grouping(host("packed", "torch")).of("linear")[0], evidence("packed", "torch")
    assert "calibration data" in SMALL.propose(group, None).reason
    assert LowRank().propose(group, seen).reason == "it is no layer of real weights, 64 wide at least"
    assert "would leave more than 0.9" in replace(SMALL, multiple=64).propose(group, seen).reason
    with pytest.raises(OutOfRange, match="ranks from 1 to 3"):
        factored(torch.ones(3, 4), torch.eye(4), 4)
    with pytest.raises(OutOfRange, match="shares of products in"):
        LowRank(shares=(1.0,))
    (bare,) = (c for c in SMALL.propose(group, seen)[:1])
    with pytest.raises(PlanError, match="does not hold the numbers"):
        SMALL.apply(bare, Grouping(host("packed", "torch").copy()).of("linear")[0])
