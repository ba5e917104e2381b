"""What was rounded before: found by content alone, made anew when anything differs, let go beyond the limit."""

from __future__ import annotations

import torch

from attnopt.rounding.grids import Gridding
from attnopt.rounding.rounded_before import RoundedBefore, held
from attnopt.rounding.weight_format import WeightFormat

FORMAT = WeightFormat(4, 16, False)


def test_the_same_numbers_in_another_tensor_are_not_rounded_again():
    weight = torch.randn(8, 32)
    first, again = Gridding().rounded(weight, FORMAT), Gridding().rounded(weight.clone(), FORMAT)
    assert again is first
    turned = weight.clone().T.contiguous().T  # the same numbers, laid otherwise
    assert Gridding().rounded(turned, FORMAT) is first


def test_whatever_differs_is_made_anew():
    weight = torch.randn(8, 32)
    first = Gridding().rounded(weight, FORMAT)
    other = weight.clone()
    other[3, 5] += 1.0
    assert not torch.equal(Gridding().rounded(other, FORMAT).matrix()[3], first.matrix()[3])
    assert Gridding().rounded(weight, WeightFormat(8, 16, False)).format.bits == 8
    assert Gridding().rounded(weight.view(16, 16), FORMAT).shape == (16, 16)
    counted = Gridding().rounded(weight, FORMAT, torch.arange(32.0).square())
    assert not torch.equal(counted.steps, first.steps)
    assert not torch.equal(Gridding("extremes").rounded(weight, FORMAT).steps, first.steps)
    weight[0] = 7.0  # in place: the numbers count, not the tensor
    assert not torch.equal(Gridding().rounded(weight, FORMAT).matrix()[0], first.matrix()[0])


def test_what_was_used_longest_ago_goes_first():
    some = [torch.full((4, 16), float(i)) for i in range(3)]
    made = [Gridding().rounded(x, FORMAT) for x in some]
    store = RoundedBefore(memory=2 * held(made[0]))
    for i in (0, 1, 0, 2):
        store.of("a", (some[i],), lambda i=i: made[i])
    assert list(store.kept.values()) == [made[0], made[2]] and store.size == 2 * held(made[0])
    assert store.of("a", (some[1],), lambda: made[2]) is made[2]  # gone: made anew
