"""A layer on narrow weights is the float layer on the weights that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnopt.rounding.grids import Gridding
from attnopt.rounding.weight_format import WeightFormat
from attnopt.runtime.rounded_linear import rounded_linear

GRIDS = [(0, False, "squares"), (16, True, "squares"), (32, False, "gaussian"), (0, False, "gaussian")]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("group", "zeros", "kind"), GRIDS)
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64)])
def test_it_is_the_layer_on_what_the_codes_stand_for(bits, group, zeros, kind, shape):
    torch.manual_seed(bits)
    made = Gridding(kind).rounded(torch.randn(10, 64), WeightFormat(bits, group, zeros))
    x, bias = torch.randn(shape), torch.randn(10)
    arrays = made.arrays()
    points = made.zeros.to(torch.uint8) if zeros else None
    got = rounded_linear(x, arrays["codes"], made.steps, points, bias, bits, 0.0 if zeros else made.zeros)
    torch.testing.assert_close(got, torch.nn.functional.linear(x, made.matrix(), bias), rtol=1e-6, atol=1e-6)


def test_shapes_are_known_without_running_it():
    with FakeTensorMode():
        x, codes, steps = torch.empty(2, 3, 32), torch.empty(48, 16, dtype=torch.uint8), torch.empty(48, 1)
        assert rounded_linear(x, codes, steps, None, None, 4, 8.0).shape == (2, 3, 48)
