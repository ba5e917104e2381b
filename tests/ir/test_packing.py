"""What is packed and unpacked is what the reference rounds to, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from attnopt.ir.packing import Packed, apart, joined, pack, refusal, unpack
from attnopt.ir.reference import reference
from attnopt.ir.spec import parse


def clause(line):
    return parse(f"softmax cache({line})").cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("storage", ["int8", "int4", "int2", "int1", "fp8", "bf16", "fp16", "fp32"])
def test_round_trip_is_what_the_reference_rounds_to(storage, dtype):
    q, k, v = (torch.randn(2, 2, n, 32, dtype=dtype) + shift for n, shift in ((1, 0.0), (25, 0.3), (25, -1.0)))
    words = itertools.product(("token", "channel"), (0, 8), ("ends", "symmetric"), ("fp32", "fp16", "bf16"))
    for axis, group, levels, scales in words:
        if (storage, levels) == ("int1", "symmetric"):
            continue  # three levels
        line = f"k={storage}, v={storage}, k_axis={axis}, v_axis={axis}, group={group}, levels={levels}, scales={scales}"
        right = reference(f"softmax cache({line})", q, k, v)
        a, b = (unpack(pack(x, clause(line), side), clause(line), side, dtype) for x, side in ((k, "k"), (v, "v")))
        assert torch.equal(reference("softmax", q, a, b), right), line


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("width", [8, 16, 24, 40, 64, 96, 128])
def test_codes_share_bytes(bits, width):
    codes = torch.randint(0, 2**bits, (3, 5, width), dtype=torch.uint8)
    bytes_of = joined(codes, bits)
    assert (bytes_of.dtype, bytes_of.shape) == (torch.uint8, (3, 5, width * bits // 8))
    assert torch.equal(apart(bytes_of, bits), codes)


def test_bytes_by_hand():
    codes = torch.arange(16, dtype=torch.uint8)
    assert joined(codes, 4).tolist() == [j + 16 * (j + 8) for j in range(8)]
    assert joined(torch.tensor([0, 1, 2, 3, 3, 2, 1, 0], dtype=torch.uint8), 2).tolist() == [
        0 + 4 * 2 + 16 * 3 + 64,
        1 + 4 * 3 + 16 * 2,
    ]
    with pytest.raises(ValueError, match="rows of 5 channels cannot be packed two to a byte; the nearest widths are 4 and 6"):
        joined(codes[:5], 4)
    with pytest.raises(ValueError, match=r"rows of 3 channels cannot be packed four to a byte; the nearest widths are 4$"):
        joined(codes[:3], 2)


def test_numbers_that_are_not_finite_are_named():
    x = torch.randn(2, 3, 7, 8)
    x[1, 2, 4, 5] = torch.nan
    with pytest.raises(ValueError, match="k is nan in sequence 1, head 2, token 4, channel 5"):
        pack(x, clause("k=int4"), "k")
    x[0, 1, 3, 2] = -torch.inf
    with pytest.raises(ValueError, match="v is -inf in sequence 0, head 1, token 3, channel 2"):
        pack(x, clause("v=int2, group=4"), "v")


@pytest.mark.parametrize(
    ("line", "codes", "scales", "zeros"),
    [
        ("k=int8", (torch.int8, 32), (25, 1), True),
        ("k=int8, levels=symmetric", (torch.int8, 32), (25, 1), False),
        ("k=int4, group=8, scales=fp16", (torch.uint8, 16), (25, 4), True),
        ("k=int4, k_axis=channel, group=8", (torch.uint8, 16), (4, 32), True),
        ("k=int2, group=16", (torch.uint8, 8), (25, 2), True),
        ("k=int1, k_axis=channel", (torch.uint8, 4), (1, 32), True),
        ("k=fp8, k_axis=channel", (torch.float8_e4m3fn, 32), (1, 32), False),
    ],
)
def test_shapes(line, codes, scales, zeros):
    made = pack(torch.randn(2, 3, 25, 32), clause(line), "k")
    assert (made.codes.dtype, tuple(made.codes.shape)) == (codes[0], (2, 3, 25, codes[1]))
    assert made.scales.shape == (2, 3, *scales)
    assert made.scales.dtype == (torch.float16 if "fp16" in line else torch.float32)
    assert made.scales.is_contiguous()
    assert (made.zeros is not None) == zeros


def test_codes_by_hand():
    x = torch.tensor([-1.0, 0.0, 0.5, 6.5])[None, None, None]
    made = pack(x, clause("k=int4"), "k")
    assert (made.scales.item(), made.zeros.item()) == (0.5, -2.0)
    assert apart(made.codes, 4).flatten().tolist() == [0, 2, 3, 15]
    assert unpack(made, clause("k=int4"), "k", torch.float32).flatten().tolist() == [-1.0, 0.0, 0.5, 6.5]
    symmetric = pack(x, clause("k=int8, levels=symmetric"), "k")
    assert symmetric.codes.flatten().tolist() == [-20, 0, 10, 127]
    assert unpack(Packed(x), None, "k", torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("k=int4, recent=4", "the newest tokens stay exact"),
        ("k=int4, k_basis=hadamard", "k_basis of the cache"),
        ("v=int4, levels=middles", "levels of the cache lie in the middle of their bins"),
        ("v=int3", "int3 codes have no packed form; the nearest are int2 and int4"),
        ("v=int1, levels=symmetric", "symmetric levels are three at least, and int1 has two"),
        ("k=int4, v_basis=hadamard", "v_basis of the cache"),
        ("k=int4, k_axis=channel, block=64", "tokens are rounded a block at a time"),
        ("codebook=c", "keys are read from a codebook"),
    ],
)
def test_refusals(line, reason):
    assert refusal(clause(line)).reason == reason
    assert refusal(None) is None
    assert refusal(clause("k=int4, v=fp8, group=32, clip=0.9")) is None


@pytest.mark.parametrize("storage", ["int8", "int4", "int2"])
def test_blocks_and_balanced_values_are_what_the_reference_rounds_to(storage):
    """Tokens that are rounded a block at a time, the last of them short."""
    line = f"k={storage}, v={storage}, k_axis=channel, block=8, scales=fp16, v_balance=root"
    assert refusal(clause(line)).reason == "tokens are rounded a block at a time"
    assert refusal(clause(line), blocks=True) is None
    q, k, v = (torch.randn(2, 2, n, 32) + shift for n, shift in ((1, 0.0), (25, 0.3), (25, -1.0)))
    v[0, 1, :8, 3] = 0.0  # nothing to balance
    found = pack(v, clause(line), "v")
    assert (found.scales.shape, found.balance.shape) == ((2, 2, 25, 1), (2, 2, 4, 32))
    a, b = (unpack(pack(x, clause(line), side), clause(line), side, torch.float32) for x, side in ((k, "k"), (v, "v")))
    torch.testing.assert_close(reference("softmax", q, a, b), reference(f"softmax cache({line})", q, k, v), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("v=int8, v_balance=root", "values are balanced in blocks of tokens, each token with a scale and a zero point"),
        ("v=int8, block=8, v_axis=channel, v_balance=root", "values are balanced in blocks of tokens, each token with a scale and"
         " a zero point"),
        ("k=int8, k_axis=channel, block=8, group=4", "tokens are rounded in blocks, and in groups of another size"),
    ],
)  # fmt: skip
def test_blocks_that_are_not_packed(line, reason):
    assert refusal(clause(line), blocks=True).reason == reason
