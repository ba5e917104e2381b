"""Packed sequences in one kernel, each as if it were alone; what stands beside a sequence is not its business."""

from __future__ import annotations

import pytest
import torch
from packed_cases import PACKED

from attnopt.codegen.emitted import load
from attnopt.codegen.triton.prefill import Form, emit, supports
from attnopt.codegen.triton.tiles import Tile
from attnopt.ir.spec import parse

TILE = Tile(16, 16, 1, 1)
DESCRIPTORS = Tile(16, 16, 1, 1, descriptors=True)


def module(case, tile, lse=False):
    spec = parse(case.spec)
    form = Form(*case.width, "float32", tuple((name, "float32") for name in spec.operands), lse, packed=True)
    assert supports(spec, form) is None
    return load(emit(spec, form, tile))


def run(case, given, operands, tile, lse=False, work=None):
    q, _, v = given[:3]
    poisoned = torch.full((*q.shape[:2], v.shape[2]), torch.nan)
    return module(case, tile, lse).attention_packed(*given, *operands.values(), work=work, o=poisoned)


@pytest.mark.parametrize(
    ("name", "tile"), [*((name, TILE) for name in PACKED), ("causal", DESCRIPTORS), ("hidden_rows", DESCRIPTORS)]
)
def test_each_sequence_is_as_if_alone(name, tile):
    case = PACKED[name]
    given, operands = case.tensors()
    found, lse = run(case, given, operands, tile, lse=True)
    output, wanted = case.wanted()
    torch.testing.assert_close(found.double(), output, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse[0].double(), wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("tile", [TILE, DESCRIPTORS])
def test_what_the_next_sequence_holds_does_not_matter(tile):
    case = PACKED["causal"]
    (q, k, v, *starts), _ = case.tensors()
    k[17:], v[17:] = torch.nan, torch.inf
    found = run(case, (q, k, v, *starts), {}, tile)
    torch.testing.assert_close(found[:17].double(), case.wanted()[0][:17], atol=2e-5, rtol=2e-5)


def test_work_is_sorted_and_can_be_shared():
    case = PACKED["last_queries"]
    given, _ = case.tensors()
    made = module(case, TILE)
    work, items = made.schedule(*given[3:], sum(case.q_len))
    blocks = [tuple(pair) for pair in work[: int(items)].tolist()]
    assert sorted(blocks) == [(0, 0), (1, 0), (2, 0), (3, 0), (3, 1)]
    assert blocks[:2] in ([(2, 0), (3, 1)], [(3, 1), (2, 0)], [(2, 0), (3, 0)])
    assert torch.equal(run(case, given, {}, TILE, work=(work, items)), run(case, given, {}, TILE))


def test_through_the_operator():
    case = PACKED["by_sequence"]
    given, operands = case.tensors()
    halves = [x.bfloat16() if x.is_floating_point() else x for x in given]
    found = torch.ops.attnopt.triton_attention_packed(*halves, list(operands.values()), case.spec)
    assert (found.dtype, tuple(found.shape)) == (torch.bfloat16, (*given[0].shape[:2], 16))
    torch.testing.assert_close(found.double(), case.wanted()[0], atol=6e-2, rtol=6e-2)
    o, lse = torch.ops.attnopt.triton_attention_packed_lse(*given, list(operands.values()), case.spec)
    torch.testing.assert_close(o.double(), case.wanted()[0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), case.wanted()[1], atol=2e-5, rtol=2e-5)


def test_no_queries():
    case = PACKED["causal"]
    (_, k, v, *starts), _ = case.tensors()
    nothing = torch.empty(0, 2, 16)
    assert torch.ops.attnopt.triton_attention_packed(
        nothing, k, v, torch.zeros_like(starts[0]), starts[1], [], case.spec
    ).shape == (0, 2, 16)
