"""The eager twin computes what the reference does, over the kernel's own case table, in tiles that cut every case apart."""

from __future__ import annotations

import pytest
import torch
from prefill_cases import TABLE, exact, tensors

from attnopt.codegen.triton.kernels.prefill_eager import attention


@pytest.mark.parametrize("name", TABLE)
def test_computes_what_the_reference_does(name):
    case = TABLE[name]
    given, rest = tensors(case)
    q, k, v = (x.double() for x in given)
    found = attention(q, k, v, case.spec, block_q=5, block_k=4, **{n: x if x.dtype == torch.bool else x.double() for n, x in rest.items()})
    torch.testing.assert_close(found, exact(case), atol=1e-9, rtol=1e-9)
