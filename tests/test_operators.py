"""Operators of torch whose kernels are emitted: on a CPU each computes the reference (TVM's by its kernels, where it is installed), traces
to the right shapes, and has no gradient.
"""

from __future__ import annotations

import pytest
import torch

import attnopt.operators  # noqa: F401  (registers them)
from attnopt.errors import InputMismatch
from attnopt.ir.kv_cache import attend_cache, pack_cache
from attnopt.ir.reference import attend

CACHED = "softmax scale(0.25) cache(k=int4, v=int4, group=16)"
STARTS = torch.tensor([0, 3, 3, 9], dtype=torch.int32)


def calls():
    """Arguments of each, and what it should return: the output, and the log-sum-exp."""
    torch.manual_seed(0)
    q, k, v, table = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 24), torch.randn(4)
    line = "softmax scale(0.25) sink(load(table, h))"
    plain = attend(line, q, k, v, table=table)
    wide, cache = torch.randn(2, 4, 3, 32), pack_cache(CACHED, torch.randn(2, 2, 9, 32), torch.randn(2, 2, 9, 64))
    held = attend_cache(CACHED, wide, cache)
    rows, keys, values = torch.randn(9, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 24)
    pieces = [
        attend("softmax causal", *(x[a:b].transpose(0, 1)[None] for x in (rows, keys, values))) for a, b in ((0, 3), (3, 9))
    ]
    joined = torch.cat([p.output[0].transpose(0, 1) for p in pieces]), torch.cat([p.lse[0] for p in pieces], 1)
    return {
        "triton_attention": ((q, k, v, [table], line), (plain.output, plain.lse)),
        "triton_attention_packed": ((rows, keys, values, STARTS, STARTS, [], "softmax causal"), joined),
        "triton_decode": ((wide, *cache.parts, [], CACHED), (held.output, held.lse)),
        "tvm_attention": ((q, k, v, [table], line), (plain.output, plain.lse)),
        "tvm_decode": ((wide, *cache.parts, [], CACHED), (held.output, held.lse)),
    }


NAMES = tuple(calls())


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_on_a_cpu(name):
    given, (output, lse) = calls()[name]
    found = getattr(torch.ops.attnopt, name)(*given)
    torch.testing.assert_close(found, output, atol=1e-5, rtol=1e-5)
    both = getattr(torch.ops.attnopt, f"{name}_lse")(*given)
    torch.testing.assert_close(both, (found, lse), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_torch_can_trace_it(name):
    given, _ = calls()[name]
    for operator in (getattr(torch.ops.attnopt, name), getattr(torch.ops.attnopt, f"{name}_lse")):
        found = torch.library.opcheck(operator.default, given, test_utils=("test_schema", "test_faketensor"))
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_refused(name):
    (q, *rest), _ = calls()[name]
    with pytest.raises(InputMismatch, match="have no gradient"):
        getattr(torch.ops.attnopt, name)(q.requires_grad_(), *rest)
    with torch.no_grad():
        assert getattr(torch.ops.attnopt, name)(q, *rest).isfinite().all()
