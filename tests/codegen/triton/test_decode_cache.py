"""How a kernel reads each side of a cache."""

from __future__ import annotations

import pytest

from attnopt.codegen.triton.decode import DecodeForm
from attnopt.codegen.triton.decode_cache import side_of
from attnopt.ir.spec import parse


@pytest.mark.parametrize(
    ("cache", "side", "read", "piece"),
    [
        ("k=fp32", "k", ("plain", 96, "none", False, "float16"), (32, 3)),
        ("k=bf16", "k", ("plain", 96, "none", False, "bfloat16"), (32, 3)),
        ("k=int8", "k", ("int8", 96, "token", True, "int8"), (32, 3)),
        ("v=int8, levels=symmetric", "v", ("int8", 128, "group", False, "int8"), (128, 1)),
        ("v=int4, group=32", "v", ("int4", 64, "group", True, "uint8"), (32, 2)),
        ("k=int4, group=200", "k", ("int4", 48, "token", True, "uint8"), (16, 3)),
        ("k=int2", "k", ("int2", 24, "token", True, "uint8"), (32, 1)),
        ("v=int2, group=64", "v", ("int2", 32, "group", True, "uint8"), (32, 1)),
        ("k=int4, group=32", "k", ("int4", 48, "group", True, "uint8"), (16, 3)),  # half a row is no multiple of 32
        ("k=fp8, k_axis=channel", "k", ("fp8", 96, "channel", False, "float8_e4m3fn"), (32, 3)),
        ("k=int4, k_axis=channel, group=32", "k", ("int4", 48, "block", True, "uint8"), (16, 3)),
    ],
)
def test_sides(cache, side, read, piece):
    found = side_of(parse(f"softmax cache({cache})"), DecodeForm(96, 128), side)
    assert (found.storage, found.stored, found.scales, found.zeros, found.dtype) == read
    assert found.piece == piece
