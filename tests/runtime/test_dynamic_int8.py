"""The int8 linear layer against the float one, inside the error that rounding to 8 bits allows."""

from __future__ import annotations

import pytest
import torch

from attnopt.runtime.dynamic_int8 import PACKED, linear_dynamic_int8, quantize_weight


def test_weights_are_symmetric_with_one_scale_per_output():
    weight = torch.randn(7, 32)
    weight[3] = 0.0
    weight[4] *= 100.0
    stored, scales = quantize_weight(weight)
    assert (stored.dtype, stored.shape, scales.shape) == (torch.int8, (7, 32), (7,))
    assert stored.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127, 127]
    assert ((stored * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all()


@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 32), (1, 32)])
@pytest.mark.parametrize("biased", [True, False])
def test_error_bound(shape, biased):
    """|error| <= |x|_1 s_w / 2 + |w|_1 s_x / 2 + K s_x s_w / 4, with s_x the step of x between its least and largest element."""
    x, weight, bias = torch.randn(shape) + 0.5, torch.randn(48, 32), torch.randn(48) if biased else None
    stored, scales = quantize_weight(weight)
    got = linear_dynamic_int8(x, stored, scales, bias)
    step = (x.max().clamp(min=0) - x.min().clamp(max=0)) / 255
    bound = x.abs().sum(-1, keepdim=True) * scales / 2 + weight.abs().sum(1) * step + 32 * step * scales
    error = (got - torch.nn.functional.linear(x, weight, bias)).abs()
    assert got.shape == (*shape[:-1], 48)
    assert (error <= bound).all()
    assert 0 < error.max() < 0.5


def test_a_weight_is_packed_once_and_let_go():
    stored, scales = quantize_weight(torch.randn(16, 32))
    before, x = len(PACKED), torch.randn(3, 32)
    first = linear_dynamic_int8(x, stored, scales, None)
    assert len(PACKED) == before + 1
    torch.testing.assert_close(linear_dynamic_int8(x, stored, scales, None), first, atol=0, rtol=0)
    assert len(PACKED) == before + 1
    del stored
    assert len(PACKED) == before


def test_shapes_without_data():
    with torch._subclasses.FakeTensorMode():
        made = linear_dynamic_int8(torch.empty(2, 3, 32), torch.empty(48, 32, dtype=torch.int8), torch.empty(48), None)
    assert made.shape == (2, 3, 48)
