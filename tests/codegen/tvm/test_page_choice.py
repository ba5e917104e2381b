"""Pages by a kernel are those that torch chooses, as a table with the number of their keys."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen.chosen_pages import by_torch, by_tvm, run_pages, tables_by_tvm
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.cpu import named
from attnopt.codegen.tvm.page_choice import ChoiceForm, choose_pages, emit
from attnopt.ir.reference import reference
from attnopt.ir.spec import parse
from attnopt.selectors.pages import state_of

NEEDS_TVM = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def clause(options, count=9):
    return parse(f"softmax pages(16, {count}{options})").selection


def rows(heads, key_heads, width, length):
    made = torch.Generator().manual_seed(0)
    return (torch.randn(2, h, n, width, generator=made) for h, n in ((heads, 1), (key_heads, length), (key_heads, length)))


@NEEDS_TVM
@pytest.mark.parametrize(
    ("options", "heads", "width"),
    [("", (4, 4), 64), (", recent=1, group=max", (4, 2), 40), (", recent=2, group=mean", (6, 2), 16)],
)
def test_the_choice_of_torch(options, heads, width):
    for length in (700, 704):
        q, k, _ = rows(*heads, width, length)
        state = state_of(k, 16)
        for count in (2, 9, 44, 60):  # of 44 pages
            found = choose_pages(clause(options, count), q, state, 731)
            right = by_torch(clause(options, count), q, state, 731)
            assert all(torch.equal(x, y) for x, y in zip(found, right, strict=True))


@NEEDS_TVM
@pytest.mark.parametrize("options", ["", ", recent=1, group=max"])
def test_where_every_bound_is_negative(options):
    """Places that only fill a vector come after every page."""
    q, k, _ = rows(4, 4, 64, 21 * 16)
    q, k = q.abs(), -k.abs()
    found, right = (choose(clause(options, 9), q, state_of(k, 16), 336) for choose in (choose_pages, by_torch))
    assert all(torch.equal(x, y) for x, y in zip(found, right, strict=True))


@NEEDS_TVM
def test_of_equal_pages_the_first():
    q, k, _ = rows(4, 4, 64, 320)
    pages, lengths = choose_pages(clause("", 4), torch.zeros_like(q), state_of(k, 16), 320)
    assert pages[1].tolist() == [320, 336, 352, 368] and (lengths == 64).all()


@NEEDS_TVM
def test_what_is_not_chosen_is_not_read():
    q, k, v = rows(4, 4, 64, 320)
    spec = parse("softmax scale(0.2) pages(16, 3)")
    state = state_of(k, 16)
    right = reference(spec, *(x.double() for x in (q, k, v)))
    pages = set(tables_by_tvm(spec.selection, q, state, 320)[0].flatten().tolist())
    for page in set(range(0, 2 * 4 * 320, 16)) - pages:
        for x in (k, v):
            x.view(-1, 64)[page : page + 16] = torch.nan
    found = run_pages(by_tvm, spec, q, k, v, state, tables_by_tvm)
    torch.testing.assert_close(found.double(), right, atol=2e-5, rtol=2e-5)


def test_what_the_kernel_has_not_is_left_to_torch():
    q, k, _ = rows(18, 2, 16, 64)
    assert choose_pages(clause(""), q, state_of(k, 16), 4) is None  # nine heads to a key head
    q, k, _ = rows(2, 2, 16, 64)
    assert choose_pages(clause(""), q.double(), state_of(k.double(), 16), 4) is None


def test_a_file_says_what_it_is_for():
    text = emit(parse("softmax pages(16, 1, recent=2, group=max)"), ChoiceForm(40, 2), named("haswell"))
    assert text.startswith('"""Pages of 16 keys that a query of 40 channels reads, group=max."""')
    assert "D_LANES = 8" in text and "RECENT = 2" in text and "APART" not in text and "MEAN" not in text
