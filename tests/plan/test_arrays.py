"""Arrays of the size of weights: nothing is computed before a move is made, then once, whatever the search does with it."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from linear_models import Layers, groups, opened
from small_searches import layers, setting

import attnopt
from attnopt.analysis.calibration import Calibration
from attnopt.analysis.evidence import Evidence
from attnopt.analysis.store import Store
from attnopt.errors import PlanError
from attnopt.passes import Gptq
from attnopt.plan.arrays import Arrays, size
from attnopt.plan.budgeted import prepared
from attnopt.plan.options.proposals import Move, moves_of, uniform
from attnopt.report.plan import Plan
from attnopt.rounding.gptq import Gptq as Method
from attnopt.rounding.grids import Gridding


@pytest.fixture
def counted(monkeypatch):
    """How often weights are rounded, and moments swept."""
    counts = Counter()
    for owner, name in ((Method, "rounded"), (Gridding, "rounded"), (Evidence, "second_moment")):

        def wrapped(*args, _call=getattr(owner, name), _key=f"{owner.__name__}.{name}", **kwargs):
            counts[_key] += 1
            return _call(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)
    return counts


def test_nothing_is_computed_until_a_move_is_made_and_then_once(counted):
    search = prepared(setting(layers(3), 0.5, (Gptq(),), select="model"))
    assert not counted and search.kinds == ["gptq: int4 group 32", "gptq: int4 group 64"]
    shop = search.losses.workshop
    moves = moves_of(search.classes, uniform(search.classes, search.kinds[0]))
    for some in (moves, moves[:1], moves):
        shop.built(some)
    assert counted["Gptq.rounded"] == counted["Evidence.second_moment"] == shop.arrays.computed == 3
    assert all(not m.candidate.arrays for m in moves) and all(m.candidate.arrays for m in shop.arrays.ready(moves))


@pytest.fixture(scope="module")
def move():
    host = opened("torch")
    name = next(iter(host.example_inputs()))
    batches = [{name: torch.randn(20, 64, generator=torch.Generator().manual_seed(i))} for i in range(2)]
    evidence = Evidence(host, Calibration.of(host.graph, batches))
    return [Move(Gptq(), g, Gptq().propose(g, evidence)[0]) for g in groups(host)[:2]], evidence


def test_what_was_used_longest_ago_is_forgotten_first(move):
    moves, evidence = move
    arrays = Arrays(evidence, memory=1)
    first, second = arrays.ready(moves)
    assert arrays.computed == 2 and len(arrays.kept) == 1
    (again,) = arrays.ready(moves[1:])
    assert arrays.computed == 2 and again.candidate.arrays == second.candidate.arrays
    (again,) = arrays.ready(moves[:1])
    assert arrays.computed == 3 and size([first.candidate.arrays]) == size([again.candidate.arrays]) > 0


def test_a_store_keeps_them_for_the_next_search(move, tmp_path):
    moves, evidence = move
    there = Evidence(evidence.host, evidence.calibration, store=Store(tmp_path))
    first, again = Arrays(there), Arrays(there)
    made, read = first.ready(moves)[0].candidate.arrays, again.ready(moves)[0].candidate.arrays
    assert (first.computed, again.computed) == (2, 0)
    for node, arrays in made.items():
        assert arrays.keys() == read[node].keys() and all(torch.equal(x, read[node][n]) for n, x in arrays.items())


def test_without_data_moves_stay_as_they_are(move):
    moves, evidence = move
    assert Arrays().ready(moves) == tuple(moves)
    assert Arrays(Evidence(evidence.host)).ready(moves) == tuple(moves)


@pytest.fixture(scope="module")
def rounded():
    """A model whose layers are rounded by GPTQ, and all that a user has of it."""
    torch.manual_seed(0)
    model = Layers().eval()
    batches = [(torch.randn(4, 64),) for _ in range(8)]
    fast = attnopt.optimize(
        model, batches[0], calibration=batches, budget=1.0, passes=["gptq"], minimise="memory", select="model"
    )
    assert {s.rewrite for s in fast.plan.steps} == {"gptq"}
    return model, batches, fast


def file_of(plan):
    return Plan.from_json(json.loads(json.dumps(plan.to_json())))


def test_a_plan_from_a_file_rounds_again_by_the_same_data(rounded):
    model, batches, fast = rounded
    again = attnopt.optimize(model, batches[0], calibration=batches, plan=file_of(fast.plan))
    torch.testing.assert_close(again(*batches[1]), fast(*batches[1]), atol=0, rtol=0)
    assert again.plan == file_of(fast.plan) and all(s.arrays for s in again.plan.steps)
    assert not any("other data" in note for note in again.report.notes)


def test_other_data_do_with_a_line_and_none_is_an_error(rounded):
    model, batches, fast = rounded
    other = [(x + 1.0,) for (x,) in batches]
    again = attnopt.optimize(model, batches[0], calibration=other, plan=file_of(fast.plan))
    assert any("other data than those that the plan was found on" in note for note in again.report.notes)
    with pytest.raises(PlanError, match=r"does not hold the codes that 'gptq' found .* Give the calibration data"):
        attnopt.optimize(model, batches[0], plan=file_of(fast.plan))


def test_codes_are_read_from_the_file_that_was_written_with_the_plan(tmp_path):
    original, path = tmp_path / "original.onnx", tmp_path / "fast.onnx"
    opened("onnx").save(original, {})
    batches = [{"x": torch.randn(4, 64, generator=torch.Generator().manual_seed(i))} for i in range(8)]
    made = attnopt.optimize(
        original, batches[0], calibration=batches, budget=1.0, passes=["gptq"], minimise="memory", select="model"
    )
    made.export(path)
    again, inputs = attnopt.optimize(original, batches[0], plan=path), {"x": batches[1]["x"].numpy()}
    assert (attnopt.load(path)(inputs)[0] == again(inputs)[0]).all()
    written, read = made.plan.steps, attnopt.load(path).plan.steps
    for one, other in zip(written, read, strict=True):
        (node,) = one.nodes
        assert all(torch.equal(x, other.arrays[node][name]) for name, x in one.arrays[node].items())
    with pytest.raises(PlanError, match="or as the plan the file"):
        attnopt.optimize(original, {"x": batches[0]["x"] + 1}, plan=file_of(made.plan))
