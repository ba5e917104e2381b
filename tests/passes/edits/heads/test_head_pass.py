"""Changes of heads are found again from a plan's file, and fitted output projections lose less, in both hosts."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import torch
from shrunk_models import IDS, evidence, host, model, output, rewritten

import attnopt
from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.errors import PlanError
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.site import Refusal
from attnopt.passes import EigenAttention, KeyNormGroups, MeanPooling, PruneHeads, WeightedGroups
from attnopt.passes.edits.heads.changes import HeadChanges
from attnopt.passes.edits.heads.head_map import HeadMap
from attnopt.passes.edits.heads.output_fit import ROWS, OutputMoments, fitted, map_of, matrix_of, output_moments, scaled
from attnopt.plan.options.groups import Grouping
from attnopt.plan.options.proposals import Move
from attnopt.plan.replay import step_of
from attnopt.report.plan import Plan

PASSES = [
    (MeanPooling(), "packed"),
    (WeightedGroups(), "packed"),
    (KeyNormGroups(groups=(2,)), "packed"),
    (PruneHeads(shares=(0.5,)), "packed"),
    (EigenAttention(thresholds=(0.6,), multiple=1), "packed"),
    (EigenAttention(thresholds=(0.6,), multiple=1), "turned"),
]


@functools.cache
def much(family, kind) -> Evidence:
    """Enough tokens for a whole matrix."""
    given, random = host(family, kind), torch.Generator().manual_seed(8)
    batches = [{"input_ids": torch.randint(0, 50, IDS.shape, generator=random)} for _ in range(16)]
    return Evidence(given, Calibration.of(given.graph, batches), sites=Grouping(given).sites)


def lost(given, rewrite, candidate) -> float:
    """In the output of the first block."""
    made = rewritten(given, lambda g: rewrite.apply(candidate, g), [0])
    ends = [Grouping(x).blocks[0].residual.node.output for x in (given, made)]
    (wanted,), (got,) = (x.tap([end], {"input_ids": IDS}) for x, end in zip((given, made), ends, strict=True))
    return float((wanted - got).norm() / wanted.norm())


@pytest.mark.parametrize(("rewrite", "family"), PASSES, ids=[f"{r.name} {f}" for r, f in PASSES])
def test_maps_are_found_again_and_the_fitted_twin_loses_less(rewrite, family):
    given, found = host(family, "torch"), much(family, "torch")
    group = Grouping(given).of("block")[0]
    plain, twin = rewrite.propose(group, found)[:2]
    assert twin.kind == f"{plain.kind}, fitted" and twin.needs == "tuning" and not twin.arrays
    again = rewrite.arrays(replace(plain, arrays={}), group, found)
    for node, held in plain.arrays.items():
        for name, x in held.items():
            torch.testing.assert_close(again[node][name], x)
    fit = replace(twin, arrays=rewrite.arrays(rewrite.tune(twin, group, found), group, found))
    assert lost(given, rewrite, fit) < 0.97 * lost(given, rewrite, plain)


def test_both_hosts_fit_alike():
    rewrite, made = MeanPooling(groups=(2,)), []
    for kind in ("torch", "onnx"):
        group, found = Grouping(host("packed", kind)).of("block")[0], much("packed", kind)
        changes = rewrite.fit({"groups": 2, "align": False}, group, found)
        made.append(changes.o.rows(group.blocks[0].o.rows()))
    torch.testing.assert_close(*made, atol=1e-3, rtol=1e-3)


def test_a_fit_is_the_least_squares_and_of_nothing_changed_the_identity():
    group, found = Grouping(host("packed", "torch")).of("block")[0], evidence("packed", "torch")
    same = fitted(group, HeadChanges(), found)
    torch.testing.assert_close(matrix_of(same.o, 4), torch.eye(32, dtype=torch.float64), atol=1e-6, rtol=0)
    seen = output_moments(group, HeadChanges(), found)
    assert seen.rows == IDS.numel() < ROWS
    change = HeadMap(torch.tensor([[0, 2], [3, 1]]), torch.randn(2, 2, 3, 5, dtype=torch.float64))
    torch.testing.assert_close(
        map_of(matrix_of(change, 4), 2, 4).rows(torch.eye(20).double().view(4, 5, 20)),
        change.rows(torch.eye(20).double().view(4, 5, 20)),
    )


def test_factors_of_heads_are_found_where_rows_are_few():
    """a' has each head of a times a factor, which the fit undoes."""
    torch.manual_seed(0)
    a = torch.randn(50, 12, dtype=torch.float64)
    factors = torch.tensor([2.0, -0.5, 4.0], dtype=torch.float64).repeat_interleave(4)
    after = a / factors
    seen = OutputMoments(after.mT @ after / 50, after.mT @ a / 50, 50)
    made = scaled(torch.eye(12, dtype=torch.float64), seen, torch.randn(12, 6, dtype=torch.float64), 3)
    torch.testing.assert_close(made.diagonal(), factors, atol=1e-2, rtol=1e-2)


def test_a_plan_of_heads_is_applied_again_from_its_file(tmp_path):
    """The same halves of the same data give the same fit; without them it says what is missing."""
    batches = [{"input_ids": torch.randint(0, 50, (16, 12), generator=torch.Generator().manual_seed(i))} for i in range(2)]
    free = {"input_ids": {0: torch.export.Dim.DYNAMIC}}
    given = FxHost.from_captured(capture(model("packed"), {"input_ids": IDS}, free))
    half, _ = Calibration.of(given.graph, batches).split(0)
    found, group, rewrite = Evidence(given, half, sites=Grouping(given).sites), Grouping(given).of("block")[1], WeightedGroups()
    twin = rewrite.propose(group, found)[1]
    made = rewritten(given, lambda g: rewrite.apply(replace(twin, arrays=rewrite.arrays(twin, group, found)), g), [1])
    plan = Plan("torch", "cpu", "torch", steps=(step_of(Move(rewrite, group, twin)),), seed=0, data=half.fingerprint, budget=0.7)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json()))
    asked = {"plan": path, "select": "model", "dynamic_shapes": free}
    again = attnopt.optimize(model("packed"), {"input_ids": IDS}, calibration=batches, **asked)
    torch.testing.assert_close(again(input_ids=IDS), output(made), atol=1e-5, rtol=1e-5)
    assert not again.report.notes
    with pytest.raises(PlanError, match="weighted-groups' found"):
        attnopt.optimize(model("packed"), {"input_ids": IDS}, **asked)


def test_pooled_and_pruned_heads_need_no_data_to_be_found_again():
    group, found = Grouping(host("packed", "torch")).of("block")[0], evidence("packed", "torch")
    for rewrite in (MeanPooling(), PruneHeads(), KeyNormGroups(groups=(2,))):
        candidate = rewrite.propose(group, found)[0]
        assert lost(host("packed", "torch"), rewrite, replace(candidate, arrays={})) == pytest.approx(
            lost(host("packed", "torch"), rewrite, candidate), rel=1e-5
        )
    assert isinstance(EigenAttention().changes({"ranks": [4, 4]}, group, None), Refusal)
