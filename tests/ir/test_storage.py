"""Rounding to storage types against grids written out by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ir.operands import D, E, H, Q, close, qkv, rand, randn

from attnopt.errors import InputMismatch
from attnopt.ir.reference import reference
from attnopt.ir.storage import hadamard


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


def plain(k, v, q):
    return (q @ k.mT).softmax(-1) @ v


def test_values_turned_into_a_hadamard_basis():
    q, k, v = qkv(width=8, value_width=4)
    turned = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64) / 2**0.5
    basis = torch.kron(turned, turned)
    close(reference("softmax cache(v=int2, v_basis=hadamard)", q, k, v), plain(k, uniform(v @ basis, 2, -1) @ basis.mT, q))
    with pytest.raises(InputMismatch, match="The nearest are 4 and 8"):
        reference("softmax cache(v=int2, v_basis=hadamard)", *qkv(value_width=6))


def test_tokens_rounded_a_block_at_a_time():
    """ZipCache: channels of keys, and the balance of values, are of the tokens compressed together; the newest are not among them."""
    q, k, v = qkv()
    k[:, :, -2:], v[:, :, -2:] = 50 * k[:, :, -2:], 50 * v[:, :, -2:]  # if they counted, the others would have no levels left

    def balanced(x):
        root = x.abs().amax(2, keepdim=True).sqrt()
        return uniform(x / root, 4, -1) * root

    parts = [(k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 5), (5, 10))]
    keys = torch.cat([*(uniform(x, 4, -2) for x, _ in parts), k[:, :, 10:]], 2)
    values = torch.cat([*(balanced(x) for _, x in parts), v[:, :, 10:]], 2)
    line = "softmax cache(k=int4, v=int4, k_axis=channel, block=5, recent=2, v_balance=root)"
    close(reference(line, q, k, v), plain(keys, values, q))
    # The same where blocks and the newest do not meet, and where scale groups are shorter than blocks.
    keys = torch.cat([uniform(k[:, :, a:b], 4, -2) for a, b in ((0, 3), (3, 5), (5, 8), (8, 10))] + [k[:, :, 10:]], 2)
    close(reference("softmax cache(k=int4, k_axis=channel, group=3, block=5, recent=2)", q, k, v), plain(keys, v, q))


def test_exact_tokens_take_part_in_no_scale():
    q, k, v = qkv()
    bits = torch.tensor([16, 2, 2, 4] * 3)
    k[:, :, ::4] *= 100
    v[:, :, ::4] *= 100
    expected = k.clone()
    for b in (2, 4):
        expected[:, :, bits == b] = uniform(k[:, :, bits == b], b, -2)
    root = v[:, :, bits < 16].abs().amax(2, keepdim=True).sqrt()
    values = v.clone()
    for b in (2, 4):
        values[:, :, bits == b] = uniform(v[:, :, bits == b] / root, b, -1) * root
    line = "softmax cache(k_axis=channel, k_bits=load(bits, k), v_bits=load(bits, k), v_balance=root)"
    close(reference(line, q, k, v, bits=bits), plain(expected, values, q))
    assert reference("softmax cache(k_bits=16, v_bits=16)", q, k, v).equal(reference("softmax", q, k, v))
    share = 1.0 / (Q * D)  # an outlier of those that are rounded, not of those that are kept
    got = reference(f"softmax cache(k_bits=where(k % 4 == 0, 16, 2), outliers={share})", q, k, v)
    rest = k[:, :, bits < 16].flatten(2).abs()
    largest = k.abs() == rest.amax(-1)[..., None, None]
    assert not torch.allclose(got, reference("softmax cache(k_bits=where(k % 4 == 0, 16, 2))", q, k, v))
    low, high = k.masked_fill(largest, torch.inf), k.masked_fill(largest, -torch.inf)
    low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    step = (high - low) / 3
    zero = (low / step).round()
    rounded = torch.where(largest | (bits == 16)[:, None], k, (k / step).round().clamp(zero, zero + 3) * step)
    close(got, plain(rounded, v, q))


@given(
    axis=st.sampled_from(["token", "channel"]),
    group=st.sampled_from([0, 2, 3, 8]),
    block=st.sampled_from([0, 5]),
    bits=st.sampled_from([1, 2, 3, 4, 8]),
    basis=st.sampled_from(["none", "hadamard"]),
    seed=st.integers(0, 1000),
)
def test_errors_are_below_one_step(axis, group, block, bits, basis, seed):
    """|x - stored(x)| <= (max - min) / (2^bits - 1) of its scale group, in the basis that is rounded."""
    torch.manual_seed(seed)
    x = randn(1, 1, 11, 8)
    line = f"softmax cache(v=int{bits}, v_axis={axis}, group={group}, block={block}, v_basis={basis})"
    got = stored_values(line, x)
    turned = [y @ hadamard(8) if basis == "hadamard" else y for y in (x, got)]
    for part, back in zip(*(y.split(block or 11, 2) for y in turned), strict=True):
        rows = part.mT if axis == "channel" else part
        backs = back.mT if axis == "channel" else back
        for some, other in zip(*(y.split(group or rows.shape[-1], -1) for y in (rows, backs)), strict=True):
            step = (some.amax(-1, keepdim=True) - some.amin(-1, keepdim=True)) / (2**bits - 1)
            assert ((some - other).abs() <= step * (1 + 1e-9) + 1e-12).all()


def stored_values(line, x):
    """What a cache makes of values: each query sees one token alone."""
    see = torch.eye(x.shape[2], dtype=torch.float64).expand(*x.shape[:2], -1, -1)
    return reference(line, see * 1e6, see, x)


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("group", [0, 4])
def test_more_bits_lose_less(axis, group):
    x = randn(2, 2, 64, 8)
    lost = [
        (stored_values(f"softmax cache(v=int{b}, v_axis={axis}, group={group})", x) - x).square().mean() for b in (1, 2, 3, 4, 8)
    ]
    assert all(more > 3 * less for more, less in itertools.pairwise(lost))
    assert stored_values("softmax cache(v_bits=16)", x).equal(x)


def test_a_basis_helps_outliers_and_harms_constants():
    planted = randn(1, 1, 64, 64)
    planted[..., [5, 20]] *= 6
    lines = [f"softmax cache(v=int2, v_basis={basis})" for basis in ("none", "hadamard")]
    plain_loss, turned_loss = ((stored_values(line, planted) - planted).square().mean() for line in lines)
    assert turned_loss < 0.7 * plain_loss
    near = 1 + 0.1 * torch.rand(1, 1, 64, 64, dtype=torch.float64)  # one spike in the basis
    plain_loss, turned_loss = ((stored_values(line, near) - near).square().mean() for line in lines)
    assert turned_loss > plain_loss
