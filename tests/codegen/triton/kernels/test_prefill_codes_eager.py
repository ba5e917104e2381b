"""The eager twin of the kernel with rounded products computes what the reference does, over the kernel's own table."""

from __future__ import annotations

import pytest
import torch
from precision_cases import TABLE

from attnopt.codegen.triton.kernels.prefill_codes_eager import coded_rows, coded_values, means_of_blocks
from attnopt.codegen.triton.kernels.prefill_eager import attention
from attnopt.ir.reference import reference


@pytest.mark.parametrize("name", TABLE)
def test_computes_what_the_reference_does(name):
    case = TABLE[name]
    q, k, v = (x.double() for x in case.tensors())
    found = attention(q, k, v, case.spec, block_q=48, block_k=64)
    torch.testing.assert_close(found, reference(case.spec, q, k, v), atol=1e-9, rtol=1e-9)


def test_codes_are_within_half_a_step():
    x = torch.randn(1, 2, 40, 16).double()
    codes, scales = coded_rows(x, torch.arange(40) // 8)
    assert codes.abs().max() == 127
    assert ((codes * scales[..., None] - x).abs() <= scales[..., None] / 2 + 1e-12).all()
    assert (scales.unflatten(-1, (5, 8)).diff(dim=-1) == 0).all()
    values, channels = coded_values(x)
    assert ((values * channels[:, :, None] - x).abs() <= x.abs() / 16 + channels[:, :, None] * 2**-10 + 1e-12).all()


def test_means_of_blocks_of_rows():
    q = torch.randn(1, 1, 150, 4)
    mean = means_of_blocks(q)
    torch.testing.assert_close(mean[0, 0, 0], q[0, 0, :128].mean(0))
    torch.testing.assert_close(mean[0, 0, 149], q[0, 0, 128:].mean(0))
