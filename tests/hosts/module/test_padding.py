"""Prompts that are padded on their left, row by row."""

from __future__ import annotations

import pytest
import torch

from attnopt.hosts.module.padding import by_rows, starts
from attnopt.ir.reference import reference


def mask(padding: list[list[int]], keys: int | None = None, window: int = 99) -> torch.Tensor:
    """What transformers makes of rows of 1 and, for padding, 0: bool [B, 1, Q, K]."""
    real = torch.tensor(padding, dtype=torch.bool)
    at = torch.arange(real.shape[1])
    apart = at[:, None] - at
    seen = (apart >= 0) & (apart < window) & real[:, None, None]
    return torch.nn.functional.pad(seen, (0, (keys or len(at)) - len(at)))


ROWS = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


def test_rows_begin_behind_their_padding():
    assert starts(mask(ROWS), 5, None) == [2, 0]
    assert starts(mask(ROWS, window=2), 5, 2) == [2, 0]
    assert starts(mask(ROWS, keys=8), 5, None) == [2, 0]  # a cache of fixed size


@pytest.mark.parametrize(
    "given",
    [
        mask([[1, 1, 1, 0, 0]]),  # padding on the right
        mask([[1, 0, 1, 1, 1]]),
        mask([[0, 0, 0, 0, 0]]),
        mask(ROWS, window=2),  # a window that the layer does not say
        torch.ones(1, 1, 5, 8, dtype=torch.bool),  # a second part: five queries behind three keys
        torch.where(mask(ROWS), 0.0, -1e9),
        mask(ROWS)[0],
    ],
    ids=str,
)
def test_other_masks_say_nothing_of_rows(given):
    assert starts(given, 5, None) is None


def test_each_row_is_computed_as_it_is_alone():
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 6, 4, generator=random) for heads in (4, 2, 2))

    def kernel(*sides):
        return (reference("softmax causal block_topk(2, 1)", *sides),)

    found = by_rows(kernel, q, k, v, [1, 0, 1])
    assert torch.equal(found[1:2], kernel(q[1:2], k[1:2], v[1:2])[0]) and not found[0, :, 0].any()
    assert torch.equal(found[2:, :, 1:], kernel(*(x[2:, :, 1:] for x in (q, k, v)))[0])
    assert by_rows(kernel, q, k, v, [5, 0, 0]) is None
