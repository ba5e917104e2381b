"""The eager twin computes what the reference does, over the kernel's own case table, in tiles that cut every case apart."""

from __future__ import annotations

import pytest
import torch
from packed_cases import PACKED
from prefill_cases import TABLE, exact, tensors

from attnopt.codegen.triton.kernels.prefill_eager import attention, attention_packed
from attnopt.codegen.triton.row_norms import is_static
from attnopt.ir.reference import reference
from attnopt.ir.spec import parse


@pytest.mark.parametrize("name", TABLE)
def test_computes_what_the_reference_does(name):
    case = TABLE[name]
    given, rest = tensors(case)
    q, k, v = (x.double() for x in given)
    found = attention(
        q, k, v, case.spec, block_q=5, block_k=4, **{n: x if x.dtype == torch.bool else x.double() for n, x in rest.items()}
    )
    torch.testing.assert_close(found, exact(case), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name):
    case = PACKED[name]
    (q, k, v, *starts), operands = case.tensors()
    given, rest = (x.double() for x in (q, k, v)), {n: x.double() for n, x in operands.items()}
    found = attention_packed(*given, *starts, case.spec, block_q=5, block_k=4, **rest)
    torch.testing.assert_close(found, case.wanted()[0], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["rms", "l2", "layer", "l2, center=yes"])
@pytest.mark.parametrize("limit", [1.0, 1e6])
def test_norms_and_a_constant_maximum(kind, limit):
    name, *option = kind.split(", ")
    line = f"softmax norm({', '.join([name, 'q_gain=g', 'k_gain=f', *option])}) scale(0.5) causal"
    q, k, v = torch.randn(1, 4, 20, 16).double(), torch.randn(1, 2, 20, 16).double(), torch.randn(1, 2, 20, 8).double()
    gains = {"g": torch.rand(4, 16).double(), "f": torch.rand(16).double()}
    limits = dict.fromkeys(gains, limit)
    assert is_static(parse(line), 16, "float32", limits) == (limit == 1.0)
    found = attention(q, k, v, line, block_q=5, block_k=4, limits=limits, **gains)
    torch.testing.assert_close(found, reference(line, q, k, v, **gains), atol=1e-9, rtol=1e-9)
