"""What counts as the same model: tolerances by dtype, NaN, infinities, shapes."""

from __future__ import annotations

import math

import pytest
import torch

from attnopt.errors import AccuracyError
from attnopt.plan.judge.verify import TOLERANCES, difference, require_equal, require_rounded_alike, shared

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4), ("float16", 1e-2), ("bfloat16", 6e-2)])
def test_each_dtype_has_its_tolerance(dtype, tolerance):
    assert TOLERANCES[dtype] == tolerance
    before = [torch.tensor([100.0, -3.0], dtype=getattr(torch, dtype))]
    inside, outside = ([before[0].double() * (1 + factor * tolerance)] for factor in (0.5, 2.0))
    assert require_equal(before, inside).tolerance == tolerance
    with pytest.raises(AccuracyError) as raised:
        require_equal(before, outside)
    assert raised.value.tolerance == tolerance
    assert raised.value.max_rel == pytest.approx(2 * tolerance, rel=1e-6)
    assert raised.value.max_abs == pytest.approx(200 * tolerance, rel=1e-6)


def test_the_largest_difference_over_all_outputs():
    before = [torch.tensor([1.0, -8.0]), torch.tensor([0.25])]
    found = difference(before, [torch.tensor([1.0, -9.0]), torch.tensor([0.75])])
    assert found.max_abs == 1.0
    assert found.max_rel == 0.5  # 1 / 8 in the first, 0.5 / max(1, 0.25) in the second
    assert difference(before, before) == difference(before, before, exact=True)
    assert not difference(before, before, exact=False).exact


@pytest.mark.parametrize(
    ("before", "after", "equal"),
    [
        ([NAN, 1.0], [5.0, 1.0], True),  # the original promised nothing there
        ([NAN, NAN], [1.0, NAN], True),
        ([1.0, 1.0], [1.0, NAN], False),
        ([INF, -INF], [INF, -INF], True),
        ([INF, 1.0], [-INF, 1.0], False),
        ([INF, 1.0], [1.0, 1.0], False),
        ([1.0, 1.0], [INF, 1.0], False),
        ([], [], True),
    ],
)
def test_nan_and_infinity(before, after, equal):
    if equal:
        assert require_equal([torch.tensor(before)], [torch.tensor(after)]).max_abs == 0.0
    else:
        with pytest.raises(AccuracyError) as raised:
            require_equal([torch.tensor(before)], [torch.tensor(after)])
        assert raised.value.max_abs == INF


@pytest.mark.parametrize(
    "after",
    [[], [torch.zeros(2, 3), torch.zeros(1)], [torch.zeros(3, 2)], [torch.zeros(6)]],
    ids=["fewer", "more", "transposed", "flat"],
)
def test_other_shapes_are_another_model(after):
    with pytest.raises(AccuracyError):
        difference([torch.zeros(2, 3)], after)


def test_whole_numbers_and_truth_values_are_exact():
    ids, flags = torch.tensor([3, 4]), torch.tensor([True, False])
    require_equal([ids, flags], [ids.clone(), flags.clone()])
    for after in ([ids + 1, flags], [ids, ~flags]):
        with pytest.raises(AccuracyError):
            require_equal([ids, flags], after)


def test_what_rounds_may_differ_by_a_share_of_what_rounding_does():
    unrounded, codes = torch.tensor([1.0, 2.0, 4.0]), [torch.tensor([3])]
    wanted = [unrounded + 0.4, *codes]
    near, far = ([unrounded + 0.4 + gap, torch.tensor([4])] for gap in (0.08, 0.12))
    found = require_rounded_alike(wanted, near, [unrounded, *codes])
    assert found.max_abs == pytest.approx(0.08)
    with pytest.raises(AccuracyError) as raised:
        require_rounded_alike(wanted, far, [unrounded, *codes])
    assert raised.value.tolerance == pytest.approx(1e-4 + 0.25 * 0.4 / 4.4)
    with pytest.raises(AccuracyError):  # nothing was to be rounded: the tolerance of the dtype
        require_rounded_alike(wanted, near, wanted)


def test_where_a_last_bit_comes_far_two_runtimes_that_round_alike_may_too():
    wanted = [torch.tensor([1.0, 2.0, 4.0])]
    after, nudged = ([wanted[0] + gap] for gap in (0.12, 0.05))
    assert require_rounded_alike(wanted, after, wanted, nudged).max_abs == pytest.approx(0.12)
    with pytest.raises(AccuracyError):  # from itself it differs by half of that and less
        require_rounded_alike(wanted, after, wanted, [after[0] - 0.05])


def test_outputs_are_matched_by_name_where_a_rewrite_removed_some():
    """present.1 went, so that present.2 moved up: only what is no part of that family is the same output still."""
    before = ("logits", "present.0", "present.1", "present.2", "hidden")
    after = ("logits", "present.0", "present.1", "hidden")
    assert shared(before, after) == [(0, 0), (4, 3)]
    tensors = [torch.zeros(2), torch.ones(3), torch.ones(3), torch.ones(3), torch.zeros(2)]
    changed = [torch.zeros(2), torch.ones(3), torch.ones(3), torch.tensor([0.0, 0.5])]
    assert difference(tensors, changed, exact=False, names=(before, after)).max_abs == 0.5
    codes = [torch.zeros(2), torch.ones(3), torch.ones(3), torch.zeros(2, dtype=torch.int8)]
    assert difference(tensors, codes, exact=False, names=(before, after)).max_abs == 0.0
