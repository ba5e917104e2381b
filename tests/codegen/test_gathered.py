"""Gathered queries give the meaning of the spec; here the reference stands for the kernels of the parts."""

from __future__ import annotations

import pytest
import torch
from ir.operands import close

from attnopt.codegen.gathered import Parts, refuses, run_gathered
from attnopt.codegen.sparse import run_sparse
from attnopt.codegen.triton.packed_sequences import reference_packed
from attnopt.codegen.tvm.availability import missing
from attnopt.ir.reference import attend, reference
from attnopt.ir.spec import parse


def plain(spec, q, k, v):
    made = attend(spec, q, k, v)
    return made.output, made.lse


def packed(spec, q, k, v, q_starts, k_starts):
    made = reference_packed(spec, q, k, v, q_starts, k_starts, {})
    return made.output, made.lse


def qkv(length=45, heads=4, key_heads=2, value_heads=2, width=8, batch=2):
    made = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, length, width), (batch, key_heads, length, width), (batch, value_heads, length, width + 1))
    return tuple(torch.randn(s, generator=made, dtype=torch.float64) for s in shapes)


@pytest.mark.parametrize(
    ("clause", "heads"),
    [
        ("block_topk(8, 3)", (4, 2, 2)),
        ("block_topk(8, 3, first=1)", (4, 4, 1)),
        ("block_topk(8, 3, recent=2)", (4, 1, 1)),
        ("block_topk(64, 2)", (2, 2, 2)),  # one block: all is one's own
        ("block_topk(8, 1)", (2, 2, 2)),
    ],
)
def test_gathered_is_the_meaning(clause, heads):
    line = f"softmax scale(0.4) softcap(9.0) causal {clause}"
    q, k, v = qkv(heads=heads[0], key_heads=heads[1], value_heads=heads[2])
    assert refuses(parse(line)) is None
    close(run_gathered(Parts(plain, packed), parse(line), q, k, v), reference(line, q, k, v))


def test_all_blocks_are_dense():
    q, k, v = qkv()
    close(
        run_gathered(Parts(plain, packed), parse("softmax scale(0.4) causal block_topk(8, 6)"), q, k, v),
        reference("softmax scale(0.4) causal", q, k, v),
    )


def test_later_keys_and_values_change_nothing():
    q, k, v = qkv()
    spec = parse("softmax scale(0.4) causal block_topk(8, 2)")
    before = run_gathered(Parts(plain, packed), spec, q, k, v)[:, :, :21]
    later = [torch.cat([x[:, :, :21], 50 * x[:, :, 21:]], 2) for x in (k, v)]
    close(run_gathered(Parts(plain, packed), spec, q, *later)[:, :, :21], before)


def test_corrected():
    q, k, v = qkv()
    line = "softmax scale(0.4) causal block_topk(8, 2) delta(4, tail=0)"

    def exactly(spec, q, k, v, operands):
        return reference(spec, q, k, v, **operands)

    close(run_sparse(exactly, parse(line), q, k, v, {}, Parts(plain, packed)), reference(line, q, k, v))


def test_refusals():
    for line, why in (
        ("softmax causal block_topk(8, 2, rows=8)", "do not choose blocks each for itself"),
        ("softmax causal & document block_topk(8, 2)", "must see all"),
        ("softmax block_topk(8, 2)", "must see all"),
        ("softmax causal block_topk(8, 2, recent=0)", "does not say that a query sees its own block"),
        ("softmax causal block_topk(8, 2, first=2)", "does not say that a query sees its own block"),
        ("softmax add(alibi) causal block_topk(8, 2)", "a score reads positions"),
        ("softmax scale(load(s, h)) causal block_topk(8, 2)", "a score reads positions"),
        ("softmax causal sink(0.5) block_topk(8, 2)", "no plain softmax: sink"),
        ("sigmoid causal block_topk(8, 2)", "no plain softmax: sigmoid"),
        ("softmax offset(4) causal block_topk(8, 2)", "no plain softmax: offset"),
    ):
        found = refuses(parse(line))
        assert found is not None and why in found.reason, line


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_kernels_for_cpus():
    q, k, v = (x.float() for x in qkv(150, width=16))
    line = "softmax scale(0.4) causal block_topk(16, 3)"
    found = torch.ops.attnopt.tvm_sparse(q, k, v, [], line)
    torch.testing.assert_close(found.double(), reference(line, *(x.double() for x in (q, k, v))), atol=2e-5, rtol=2e-5)
