"""Maps between heads: identity, pooling, bases, and that weights, biases and caches go the same way."""

from __future__ import annotations

import torch

from attnopt.passes.edits.heads.head_map import HeadMap


def test_rows_bias_and_past_of_a_cache_are_mapped_alike():
    torch.manual_seed(0)
    turns = torch.linalg.qr(torch.randn(4, 8, 8, dtype=torch.float64))[0]
    made = HeadMap.pooled([(0, 1, 2), (3,)], {h: (h + 1) * torch.eye(8, dtype=torch.float64) for h in range(4)}).after(turns)
    weight, bias, x = (torch.randn(*size, dtype=torch.float64) for size in ((4, 8, 16), (4, 8), (2, 5, 16)))
    old = torch.einsum("bli,hdi->bhld", x, weight) + bias[:, None]
    new = torch.einsum("bli,hdi->bhld", x, made.rows(weight)) + made.bias(bias)[:, None]
    torch.testing.assert_close(made.past(old), new)
    by_hand = sum((h + 1) * old[:, h] @ turns[h] for h in range(3))
    torch.testing.assert_close(new[:, 0], by_hand)
    assert (made.heads, made.width) == (2, 8)


def test_the_identity_and_kept_heads_copy():
    rows = torch.randn(4, 8, 3, dtype=torch.float64)
    assert torch.equal(HeadMap.identity(4, 8).rows(rows), rows)
    assert torch.equal(HeadMap.kept([3, 1], 8).rows(rows), rows[[3, 1]])
