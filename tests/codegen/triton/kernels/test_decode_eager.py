"""The eager twin computes what the reference does, over the kernel's own case table, in splits that cut every case apart."""

from __future__ import annotations

import pytest
import torch
from decode_cases import TABLE, exact, tensors

from attnopt.codegen.triton.kernels.decode_eager import attention


@pytest.mark.parametrize("name", TABLE)
def test_computes_what_the_reference_does(name):
    case = TABLE[name]
    q, cache, rest = tensors(case)
    operands = {n: x if x.dtype == torch.bool else x.double() for n, x in rest.items()}
    o, lse = attention(q.double(), cache, case.spec, block_k=8, splits=3, **operands)
    torch.testing.assert_close(o, exact(case).output, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(lse, exact(case).lse, atol=1e-9, rtol=1e-9)
