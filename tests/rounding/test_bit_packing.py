"""Codes of every width survive packing, in as few bytes as they need, laid out as the runtimes read them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnopt.rounding.bit_packing import packed, unpacked


@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 3), st.integers(0, 999))
def test_round_trip(bits, count, rows, seed):
    codes = torch.randint(0, 2**bits, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    data = packed(codes, bits)
    assert data.shape == (rows, -(-count * bits // 8))
    assert torch.equal(unpacked(data, bits, count), codes)


BYTES = [(4, [3, 11, 0, 7], [0xB3, 0x70]), (8, [200, 1], [200, 1]), (2, [1, 2, 3, 0, 3], [0x39, 3]), (3, [5, 2, 7], [0xD5, 1])]


@pytest.mark.parametrize(("bits", "codes", "data"), BYTES)
def test_the_first_code_takes_the_lowest_bits(bits, codes, data):
    assert packed(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == data
