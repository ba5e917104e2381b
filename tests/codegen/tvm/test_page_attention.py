"""The operator for pages of a cache computes what its spec means, at any length of the cache, and reads nothing else."""

from __future__ import annotations

import pytest
import torch

import attnopt.operators  # noqa: F401  (registers it)
from attnopt.codegen import chosen_pages
from attnopt.codegen.chosen_pages import spaced
from attnopt.codegen.prefill_form import Form
from attnopt.codegen.tvm import page_attention
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.page_attention import run_tvm_pages, supports
from attnopt.errors import InputMismatch
from attnopt.ir.reference import attend
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse
from attnopt.selectors.pages import state_of

START = "softmax scale(0.3) offset(size(k) - size(q)) causal"
LINE = f"{START} pages(4, 3, low=low, high=high, recent=1)"
TOGETHER = LINE.replace("recent=1", "recent=1, group=max")


def rows(length):
    made = torch.Generator().manual_seed(length)
    return [torch.randn(2, h, n, 8, generator=made) for h, n in ((4, 1), (2, length), (2, length))]


def bounds(k):
    state = state_of(k, 4)
    return [state.low, state.high]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("line", [LINE, TOGETHER])
def test_what_the_spec_means(line, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(page_attention, "reader", lambda *_: Refusal("no compiler"))
    elif missing() is not None:
        pytest.skip("TVM is not here")
    assert parse(line).operands == ("low", "high")
    for length in (1, 3, 8, 21, 24, 31):
        q, k, v = rows(length)
        low, high = bounds(k)
        right = attend(line, q, k, v, low=low, high=high)
        found = torch.ops.attnopt.tvm_pages(q, k, v, [low, high], line)
        torch.testing.assert_close(found, right.output, atol=2e-5, rtol=2e-5)
        hidden = (right.weights == 0)[:, :, 0].view(2, 2, 2, length).all(2)  # of both heads that share keys
        for x in (k, v):
            x[hidden] = torch.nan
        assert torch.equal(run_tvm_pages(q, k, v, [low, high], line), found)


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("length", [3, 21, 24])
def test_rows_of_a_room_are_read_where_they_lie(length, monkeypatch):
    """Spare places hold anything; the last page of the last head may end behind the room."""
    q, k, v = rows(length)
    expected = run_tvm_pages(q, k, v, bounds(k), LINE)
    room, spare = [torch.full((2, 2, places, 8), torch.nan) for places in (length + 2, length + 2)], torch.randn(2, 2, 40, 8)
    for held, x in zip(room, (k, v), strict=True):
        held[:, :, :length] = x
    read, lie = [], chosen_pages.overlapping
    monkeypatch.setattr(chosen_pages, "overlapping", lambda x, size: (read.append(x.data_ptr()), lie(x, size))[1])
    places = [x[:, :, :length] for x in room]
    assert [spaced(x) for x in (*places, k, spare[:, :, 1:], spare.mT)] == [length + 2, length + 2, length, None, None]
    assert torch.equal(run_tvm_pages(q, *places, bounds(k), LINE), expected)
    assert read == [x.data_ptr() for x in room]


def test_keys_that_lie_otherwise_and_torch_can_trace_it():
    q, k, v = rows(21)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    given = [bounds(k), LINE]
    assert torch.equal(run_tvm_pages(q, *turned, *given), run_tvm_pages(q, k, v, *given))
    checks = torch.library.opcheck(
        torch.ops.attnopt.tvm_pages.default, (q, k, v, *given), test_utils=("test_schema", "test_faketensor")
    )
    assert set(checks.values()) == {"SUCCESS"}
    with pytest.raises(InputMismatch, match="have no gradient"):
        torch.ops.attnopt.tvm_pages(q.requires_grad_(), k, v, *given)


def test_refusals():
    for line, why in (
        (f"{START} pages(4, 3, recent=1)", "no operands"),
        (LINE.replace(", recent=1", ""), "not always read"),
        (LINE.replace("offset(size(k) - size(q)) ", ""), "that of the newest key"),
        (LINE.replace("causal", "causal & window(8)"), "reads positions"),
    ):
        found = supports(parse(line), Form(8, 8, "float32"))
        assert found is not None and why in found.reason, line
    q, k, v = rows(21)
    with pytest.raises(InputMismatch, match="bounds"):
        run_tvm_pages(q, k, v, bounds(k[:, :, :16]), LINE)
    with pytest.raises(InputMismatch, match="1 operands"):
        run_tvm_pages(q, k, v, bounds(k)[:1], LINE)
    with pytest.raises(InputMismatch, match="no operands"):
        run_tvm_pages(q, k, v, [], f"{START} pages(4, 3, recent=1)")
