"""Which keys are visited when data decides: what a spec is read as, and that its kernels look at nothing else."""

from __future__ import annotations

import pytest
import torch
from prefill_kernels import attention

from attnopt.codegen.prefill_form import from_rows
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.expressions import Printer
from attnopt.codegen.tvm.threads import follow_torch
from attnopt.codegen.tvm.tiles import Tile, fitting
from attnopt.codegen.tvm.visits import refusal, visits_of
from attnopt.ir.reference import attend
from attnopt.ir.spec import parse

NEEDS_TVM = pytest.mark.skipif(missing() is not None, reason="TVM is not installed")
TYPES = {"ids": "int64", "document": "int64", "padding": "bool", "seen": "float32", "list": "bool"}
TILE = Tile(64, 128, 4, 4)
PARTS = "a thread skips the values of 16 to 128 queries, a part of a tile, and of up to 512 keys"
LISTED = "softmax scale(0.25) blocks(64, 32, operand=list)"
BANDED = "softmax scale(0.25) causal & (window(60) | global(9)) blocks(24, 7, operand=list) empty(zero)"
DOCUMENTS = "softmax scale(0.25) document & causal & load(seen, b, h, k)"
OWN = "softmax scale(0.25) document"


@pytest.mark.parametrize(
    ("line", "matches", "whole", "chunk"),
    [
        ("softmax causal", (), True, 128),
        (LISTED, (), True, 32),
        ("softmax blocks(64, 192, operand=list)", (), True, 96),
        ("softmax blocks(48, 64, operand=list)", (), False, 64),
        ("softmax document & causal", ("load(document, b, q) load(document, b, k)",), True, 128),
        ("softmax load(ids, b, k) // 2 == load(ids, b, row)", ("load(ids, b, q) load(ids, b, k) // 2",), True, 128),
        ("softmax padding & document", ("1 load(padding, b, k)", "load(document, b, q) load(document, b, k)"), True, 128),
        ("softmax load(seen, b, k)", ("1 load(seen, b, k) != 0",), True, 128),
        ("softmax load(seen, b, q) == load(seen, b, k)", (), False, 128),  # reals
        ("softmax document | global(4)", (), True, 128),
        ("softmax document & load(ids, b, q + k) == 3", ("load(document, b, q) load(document, b, k)",), False, 128),
    ],
)  # fmt: skip
def test_what_decides(line, matches, whole, chunk):
    found, plain = visits_of(from_rows(parse(line)), TILE, Printer(TYPES))
    assert tuple(f"{match.query} {match.key}" for match in found.matches) == matches
    assert (found.whole, found.chunk) == (whole, chunk)
    assert plain.selection is None
    assert ("load(list, b, h, row // 48, k // 64)" in str(plain.mask)) == ("48" in line)


def test_refusals():
    for line, reason in (
        ("softmax block_topk(64, 4)", "block_topk chooses keys from the scores; a kernel takes blocks(m, n, operand=…)"),
        ("softmax blocks(0, 64, operand=list)", "blocks(0, 64, operand=list) has blocks of nothing"),
        *(
            (f"softmax blocks({m}, {n}, operand=list, skip=9.0{rows})", f"{PARTS}: not of {what}")
            for m, n, rows, what in (
                (192, 64, "", "192 x 64"),
                (64, 64, ", skip_rows=24", "24 x 64"),
                (64, 1024, "", "64 x 1024"),
            )
        ),
    ):
        said = refusal(parse(line).selection)
        assert said is not None and said.reason == reason
    assert refusal(parse(LISTED).selection) is None


def test_tiles_of_one_row_of_the_list_come_first():
    table = (Tile(24, 64, 4, 4), Tile(16, 64, 4, 4), Tile(8, 64, 8, 8))
    assert fitting(table, parse("softmax blocks(64, 64, operand=list)")) == table[1:]
    assert fitting(table, parse("softmax blocks(5, 64, operand=list)")) == table
    assert fitting(table, parse("softmax")) == table
    late = parse("softmax blocks(128, 96, operand=list, skip=9.0, skip_rows=32)")
    assert refusal(late.selection) is None
    assert fitting(table, late) == (Tile(32, 96, 3, 3),)


def rows(length=200, width=16):
    return [torch.randn(2, 2, length, width) for _ in range(3)]


@NEEDS_TVM
@pytest.mark.parametrize(
    ("line", "tiles"),
    [
        (LISTED, torch.rand(1, 2, 4, 7, generator=torch.Generator().manual_seed(0)) < 0.3),
        (BANDED, (torch.rand(2, 1, 9, 29, generator=torch.Generator().manual_seed(0)) < 0.4).to(torch.int32)),
    ],
)
def test_a_list_of_blocks(line, tiles):
    q, k, v = rows()
    tiles[:, :, 0] = 0  # rows without a key
    right = attend(line, *(x.double() for x in (q, k, v)), list=tiles)
    assert (right.lse == -torch.inf).any()
    o, log_sum = attention(line, q, k, v, lse=True, list=tiles)
    torch.testing.assert_close(o.double(), right.output, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(log_sum.double(), right.lse, atol=2e-5, rtol=2e-5)


@NEEDS_TVM
def test_a_list_of_all_or_of_nothing():
    q, k, v = rows()
    o, _ = attention(LISTED, q, k, v, lse=True, list=torch.ones(1, 1, 4, 7, dtype=torch.bool))
    torch.testing.assert_close(o, torch.softmax(q @ k.mT * 0.25, -1) @ v, atol=2e-5, rtol=2e-5)
    o, log_sum = attention(LISTED, q, k, v, lse=True, list=torch.zeros(1, 1, 4, 7, dtype=torch.bool))
    torch.testing.assert_close(o, v.mean(2, keepdim=True).expand_as(o), atol=2e-5, rtol=2e-5)
    assert (log_sum == -torch.inf).all()


@NEEDS_TVM
def test_what_the_list_leaves_out_is_not_read():
    q, k, v = rows()
    tiles = torch.rand(1, 1, 4, 7) < 0.5
    tiles[..., 5], tiles[..., 1] = False, True
    want, _ = attention(LISTED, q, k, v, lse=True, list=tiles)
    k[:, :, 160:192] = v[:, :, 160:192] = float("nan")
    o, _ = attention(LISTED, q, k, v, lse=True, list=tiles)
    assert torch.equal(o, want)


@NEEDS_TVM
def test_values_of_late_tiles_are_not_read():
    """Keys after the first 32 score far below those, which all queries see."""
    line = "softmax scale(0.25) softcap(30.0) causal & (window(90) | global(40)) blocks(64, 32, operand=list, skip=5.0, skip_rows=32)"
    q, k, v = rows()
    q, k[:, :, :32] = q.abs(), k[:, :, :32].abs() + 2
    k[:, :, 32:] *= 0.1
    tiles = torch.ones(1, 1, 4, 7, dtype=torch.bool)
    tiles[..., 3] = torch.rand(4) < 0.5
    right = attend(line, *(x.double() for x in (q, k, v)), list=tiles)
    whole = attend(line.replace("skip=5.0", "skip=inf"), *(x.double() for x in (q, k, v)), list=tiles)
    assert torch.equal(right.lse, whole.lse) and not torch.allclose(right.output, whole.output)
    v[:, :, 32:] = float("nan")
    o, log_sum = attention(line, q, k, v, lse=True, list=tiles)
    torch.testing.assert_close(o.double(), right.output, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(log_sum.double(), right.lse, atol=2e-5, rtol=2e-5)


@NEEDS_TVM
def test_what_queries_choose_of_a_block_of_keys():
    """One load for a query and a step of keys, of a table that all keys of the step share."""
    line = "softmax scale(0.25) causal & load(each, b, h, row, k // 64) blocks(64, 64, operand=list) empty(zero)"
    q, k, v = rows()
    each = torch.rand(2, 2, 200, 4) < 0.5
    tiles = torch.stack([part.any(2) for part in each.split(64, 2)], 2)
    right = attend(line, *(x.double() for x in (q, k, v)), each=each, list=tiles)
    o, _ = attention(line, q, k, v, lse=True, each=each, list=tiles)
    torch.testing.assert_close(o.double(), right.output, atol=2e-5, rtol=2e-5)


@NEEDS_TVM
@pytest.mark.parametrize("kind", ["sorted", "mixed", "one"])
def test_documents(kind):
    """Sorted ids, ids in any order, and one document whose blocks need no mask."""
    q, k, v = rows()
    ids = {"sorted": torch.arange(200) // 45, "mixed": torch.randint(-3, 3, (200,)), "one": torch.full((200,), 2**31 - 1)}[kind]
    document = torch.stack([ids, ids.flip(0)])
    seen = (torch.rand(2, 2, 200) < 0.8).float()
    seen[1, :, 100:] = 0
    right = attend(DOCUMENTS, *(x.double() for x in (q, k, v)), document=document, seen=seen)
    o, log_sum = attention(DOCUMENTS, q, k, v, lse=True, document=document, seen=seen)
    torch.testing.assert_close(o.double(), right.output, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(log_sum.double(), right.lse, atol=2e-5, rtol=2e-5)


@NEEDS_TVM
def test_other_documents_are_not_read():
    q, k, v = rows(320)
    document = (torch.arange(320) // 128).expand(2, 320)  # no strides along the batch
    want, _ = attention(OWN, q, k, v, document=document)
    k[:, :, :128] = v[:, :, :128] = float("nan")
    o, _ = attention(OWN, q, k, v, document=document)
    assert torch.equal(o[:, :, 128:], want[:, :, 128:])


@NEEDS_TVM
def test_the_number_of_threads_changes_no_bit():
    q, k, v = rows(320)
    document = (torch.arange(320) // 50).expand(2, 320)
    found, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        follow_torch()
        found.append(attention(OWN, q, k, v, document=document)[0])
    torch.set_num_threads(before)
    follow_torch()
    assert torch.equal(*found)
