"""Caches in pages and with lengths mean what their sequences mean alone."""

from __future__ import annotations

import pytest
import torch

from attnopt.errors import InputMismatch
from attnopt.ir.kv_cache import attend_cache, in_pages, pack_cache, unpacked
from attnopt.ir.reference import attend

LINE = "softmax scale(0.2) cache(k=int8, v=int4, k_axis=channel, group=8, layout=paged, page=16)"


def qkv(tokens=32):
    return torch.randn(2, 4, 1, 16), torch.randn(2, 2, tokens, 16), torch.randn(2, 2, tokens, 16)


def test_pages_hold_the_same_tokens():
    _, k, v = qkv()
    whole = pack_cache(LINE, k, v)
    cut = in_pages(whole, LINE, torch.tensor([[3, 0], [2, 5]], dtype=torch.int32), 7)
    assert (cut.k.shape, cut.k_scales.shape, cut.v.shape) == ((7, 2, 16, 16), (7, 2, 2, 16), (7, 2, 16, 8))
    assert cut.v_scales[1].isnan().all()  # a page of no sequence
    assert all(
        torch.equal(a, b) for a, b in zip(unpacked(cut, LINE, torch.float32), unpacked(whole, LINE, torch.float32), strict=True)
    )


def test_each_sequence_sees_its_own_tokens():
    q, k, v = qkv()
    line = "softmax scale(0.2) offset(size(k) - size(q)) causal & window(9)"
    found = attend_cache(line, q, pack_cache(line, k, v, torch.tensor([20, 0])))
    alone = attend(line, q[:1], k[:1, :, :20], v[:1, :, :20])
    torch.testing.assert_close(found.output[:1], alone.output)
    torch.testing.assert_close(found.lse[:1], alone.lse)
    assert torch.equal(found.output[1], torch.zeros(4, 1, 16))
    assert (found.lse[1] == -torch.inf).all()


def test_what_has_no_form():
    _, k, v = qkv()
    with pytest.raises(InputMismatch, match="the newest tokens stay exact"):
        pack_cache("softmax cache(k=int8, recent=3)", k, v)
    with pytest.raises(InputMismatch, match="cannot be packed two to a byte"):
        pack_cache("softmax cache(k=int4)", k[..., :5], v)
    with pytest.raises(InputMismatch, match="the spec names no page size"):
        in_pages(pack_cache("softmax", k, v), "softmax", torch.tensor([[0, 1], [2, 3]]))
