"""Rounding to storage types against grids written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ir.operands import D, E, H, Q, close, qkv, rand, randn

from attnopt.ir.reference import reference


def levels(x, storage, dim):
    top = {"int8": 127, "int4": 7}[storage]
    step = x.abs().amax(dim, keepdim=True) / top
    return (x / step).round() * step


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_rounded_products(storage):
    q, k, v = qkv()
    s = levels(q, storage, -1) @ levels(k, storage, -1).mT
    close(reference(f"softmax precision(q={storage}, k={storage})", q, k, v), s.softmax(-1) @ v)
    shared = levels(q, storage, (-1, -2)) @ levels(k.unflatten(2, (2, 6)), storage, (-1, -2)).flatten(2, 3).mT
    line = f"softmax precision(q={storage}, k={storage}, q_group=0, k_group=k // 6)"
    close(reference(line, q, k, v), shared.softmax(-1) @ v)
    p = (q @ k.mT).softmax(-1)
    expected = levels(p, storage, -1) @ levels(v, storage, -2)
    close(reference(f"softmax precision(p={storage}, v={storage}, v_axis=channel)", q, k, v), expected)


@pytest.mark.parametrize(("storage", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_rounding_to_float_types(storage, dtype):
    q, k, v = qkv()

    def cast(x):
        return x.to(dtype).double()

    close(reference(f"softmax precision(q={storage}, v={storage})", q, k, v), (cast(q) @ k.mT).softmax(-1) @ cast(v))
    close(reference(f"softmax cache(k={storage})", q, k, v), (q @ cast(k).mT).softmax(-1) @ v)
    close(reference("softmax precision(q=fp32) cache(k=fp32)", q, k, v), reference("softmax", q, k, v))


def test_fp8_scales_to_its_largest_number():
    q, k, v = qkv()
    peak = v.abs().amax(-2, keepdim=True) / 448
    rounded = (v / peak).to(torch.float8_e4m3fn).double() * peak
    close(reference("softmax precision(v=fp8, v_axis=channel)", q, k, v), (q @ k.mT).softmax(-1) @ rounded)


def test_smoothing_takes_out_means_exactly():
    q, k, v = qkv()
    far = k + 50 * randn(1, H, 1, D)
    plain, line = reference("softmax scale(0.3)", q, far, v), "softmax scale(0.3) precision(q=int8, k=int8{})"
    near = (reference(line.format(", k_smooth=0"), q, far, v) - plain).abs().mean()
    rough = (reference(line.format(""), q, far, v) - plain).abs().mean()
    assert near < 0.1 * rough
    every = "softmax precision(q=fp32, k=fp32, v=fp32, q_smooth=row // 4, k_smooth=0, v_smooth=0)"
    close(reference(every, q, k, v), reference("softmax", q, k, v))
    # Not only where a constant of the row cancels: the scores themselves return.
    close(reference(every.replace("softmax", "sigmoid"), q, k, v), reference("sigmoid", q, k, v))


def uniform(x, bits, dim):
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = (high - low) / (2**bits - 1)
    zero = (low / step).round()
    return ((x / step).round()).clamp(zero, zero + 2**bits - 1) * step


def test_a_rounded_cache():
    q, k, v = qkv()

    def attention(a, b):
        return (q @ a.mT).softmax(-1) @ b

    close(reference("softmax cache(k=int4, v=int2)", q, k, v), attention(uniform(k, 4, -1), uniform(v, 2, -1)))
    close(reference("softmax cache(k=int4, k_axis=channel)", q, k, v), attention(uniform(k, 4, -2), v))
    grouped = uniform(k.unflatten(-1, (2, 4)), 4, -1).flatten(-2)
    close(reference("softmax cache(k=int4, group=4)", q, k, v), attention(grouped, v))
    shift, spread, v_shift, v_spread = randn(H, D), rand(H, D) + 0.5, randn(H, E), rand(H, E) + 0.5
    moved = uniform((k - shift[:, None]) / spread[:, None], 4, -1) * spread[:, None] + shift[:, None]
    close(reference("softmax cache(k=int4, k_shift=s, k_spread=p)", q, k, v, s=shift, p=spread), attention(moved, v))
    moved = uniform((v - v_shift[:, None]) / v_spread[:, None], 4, -1) * v_spread[:, None] + v_shift[:, None]
    line = "softmax cache(v=int4, v_shift=s, v_spread=p)"
    close(reference(line, q, k, v, s=v_shift, p=v_spread), attention(k, moved))
    newest = torch.cat([uniform(k, 4, -1)[:, :, :-3], k[:, :, -3:]], 2)
    close(reference("softmax cache(k=int4, recent=3)", q, k, v), attention(newest, v))
    turned = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64) / 2**0.5
    basis = torch.kron(torch.kron(turned, turned), turned)
    close(
        reference("softmax cache(k=int4, k_basis=hadamard)", q, k, v),
        attention(uniform(k @ basis, 4, -1) @ basis.mT, v),
    )
    root = v.abs().amax(2, keepdim=True).sqrt()
    close(reference("softmax cache(v=int4, v_balance=root)", q, k, v), attention(k, uniform(v / root, 4, -1) * root))


def test_bits_per_token():
    q, k, v = qkv()
    bits = torch.tensor([2, 4, 16]).repeat(4)
    expected = torch.stack([k[:, :, t] if b == 16 else uniform(k[:, :, t], int(b), -1) for t, b in enumerate(bits)], 2)
    close(reference("softmax cache(k_bits=load(bits, k))", q, k, v, bits=bits), (q @ expected.mT).softmax(-1) @ v)
    # By channel, tokens of equal bits share a scale.
    parts = [(uniform(k[:, :, n::3], int(b), -2) if b < 16 else k[:, :, n::3]) for n, b in enumerate((2, 4, 16))]
    expected = torch.stack(parts, 3).flatten(2, 3)
    close(
        reference("softmax cache(k_bits=load(bits, k), k_axis=channel)", q, k, v, bits=bits),
        (q @ expected.mT).softmax(-1) @ v,
    )


def test_outliers_stay_and_levels_may_lie_in_the_middle():
    q, k, v = qkv()
    planted = k.clone()
    planted[0, 0, 0, 0] = 1000.0
    share = 1.5 / (Q * D)
    line = f"softmax scale(0.01) cache(k=int8, outliers={share})"
    rounded, plain = reference(line, q, planted, v), reference("softmax scale(0.01)", q, planted, v)
    assert (rounded - plain).abs().max() < (reference("softmax scale(0.01) cache(k=int8)", q, planted, v) - plain).abs().max()
    low, high = k.amin(-1, keepdim=True), k.amax(-1, keepdim=True)
    step = (high - low) / 4
    middle = low + (((k - low) / step).floor().clamp(max=3) + 0.5) * step
    close(reference("softmax cache(k=int2, levels=middles)", q, k, v), (q @ middle.mT).softmax(-1) @ v)


def test_keys_from_a_codebook():
    q, k, v = qkv()
    codes = randn(H, 5, D)
    nearest = (k[..., None, :] - codes[:, None]).square().sum(-1).argmin(-1)
    quantised = torch.stack([codes[h][nearest[:, h]] for h in range(H)], 1)
    got = reference("softmax cache(codebook=c)", q, k, v, c=codes)
    close(got, (q @ quantised.mT).softmax(-1) @ v)
    # The same from a summary of S rows: log counts as bias, mean values.
    count = F.one_hot(nearest, 5).double()
    total = torch.einsum("bhks,bhke->bhse", count, v) / count.sum(2).clamp(min=1)[..., None]
    close(got, (q @ codes.mT + count.sum(2).log()[:, :, None]).softmax(-1) @ total)


def test_symmetric_levels_and_the_type_of_scales():
    q, k, v = qkv()
    close(reference("softmax cache(k=int4, levels=symmetric)", q, k, v), (q @ levels(k, "int4", -1).mT).softmax(-1) @ v)
    step = (k.abs().amax(-1, keepdim=True) / 7).half().double()
    rounded = (k / step).round().clamp(-7, 7) * step
    close(reference("softmax cache(k=int4, levels=symmetric, scales=fp16)", q, k, v), (q @ rounded.mT).softmax(-1) @ v)


def test_groups_of_tokens_and_of_fp8():
    q, k, v = qkv()
    parts = torch.cat([uniform(part, 4, -2) for part in k.split(5, 2)], 2)
    close(reference("softmax cache(k=int4, k_axis=channel, group=5)", q, k, v), (q @ parts.mT).softmax(-1) @ v)
    peak = v.unflatten(-1, (2, E // 2)).abs().amax(-1, keepdim=True) / 448
    rounded = ((v.unflatten(-1, (2, E // 2)) / peak).to(torch.float8_e4m3fn).double() * peak).flatten(-2)
    close(reference(f"softmax cache(v=fp8, group={E // 2})", q, k, v), (q @ k.mT).softmax(-1) @ rounded)
