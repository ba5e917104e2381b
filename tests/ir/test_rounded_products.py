"""SageAttention2 written out element by element, as its entry says it, against what `precision(…)` means."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from ir.operands import close, randn

from attnopt.ir.reference import reference

HEADS, ROWS, KEYS, WIDTH, VALUES = 1, 40, 136, 8, 6
PER_THREAD = "q_group=row // 32 * 8 + row % 8, k_group=k // 64 * 4 + k % 8 // 2"
FULL = f"q=int4, k=int4, p=fp8, v=fp8, {PER_THREAD}, v_axis=channel, q_smooth=row // 16, k_smooth=0, v_smooth=0, block=64"
SCALE = WIDTH**-0.5


def half_even(x):
    return float(round(x))  # Python rounds halves to even numbers


def e4m3(x):
    """Four significant bits, exponents from -6 on, at most 448."""
    if x == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(x))), -6) - 3)
    return max(-448.0, min(448.0, half_even(x / step) * step))


def fp22(x):
    """One bit of sign, eight of exponent, thirteen of mantissa."""
    return 0.0 if x == 0 else half_even(x / (step := 2.0 ** (math.floor(math.log2(abs(x))) - 13))) * step


def fp16(x):
    return struct.unpack("e", struct.pack("e", x))[0]


def codes(rows, group, top):
    """Integers and the scale of each row: absmax / top of all rows of one group."""
    peaks: dict[int, float] = {}
    for i, row in enumerate(rows):
        peaks[group(i)] = max(peaks.get(group(i), 0.0), *(abs(x) for x in row))
    scales = [peaks[group(i)] / top for i in range(len(rows))]
    return [[half_even(x / s) for x in row] for row, s in zip(rows, scales, strict=True)], scales


def means(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def less(rows, mean):
    return [[x - m for x, m in zip(row, mean, strict=True)] for row in rows]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def sage(q, k, v, *, top, q_block, add, v_top, causal=False, block=64):
    """One head: steps (1) to (4) of the entry."""
    k_mean, v_mean = means(k), means(v)
    k, v = less(k, k_mean), less(v, v_mean)
    q_means = [means(q[first : first + q_block]) for first in range(0, len(q), q_block)]
    small = [less([row], q_means[i // q_block])[0] for i, row in enumerate(q)]
    q_codes, q_scales = codes(small, lambda r: r // 32 * 8 + r % 8, top)
    k_codes, k_scales = codes(k, lambda r: r // 64 * 4 + (r % 8) // 2, top)
    v_scales = [max(abs(x) for x in column) / v_top for column in zip(*v, strict=True)]
    v_codes = [[e4m3(x / s) for x, s in zip(row, v_scales, strict=True)] for row in v]
    output = []
    for i in range(len(q)):
        top_so_far, total, o = -math.inf, 0.0, [0.0] * len(v_scales)
        for first in range(0, len(k), block):
            keys = [j for j in range(first, min(first + block, len(k))) if not causal or j <= i]
            if not keys:
                continue
            s = [
                SCALE * (q_scales[i] * k_scales[j] * dot(q_codes[i], k_codes[j]) + dot(q_means[i // q_block], k[j])) for j in keys
            ]
            new = max(top_so_far, *s)
            decay = math.exp(top_so_far - new)
            exact = [math.exp(x - new) for x in s]
            rounded = {j: e4m3(448.0 * p) for j, p in zip(keys, exact, strict=True)}
            total, top_so_far = total * decay + sum(exact), new
            for c in range(len(o)):
                partial = 0.0
                for start in range(first, first + block, 32):
                    step = [j for j in range(start, start + 32) if j in rounded]
                    partial = add(partial + sum(rounded[j] * v_codes[j][c] for j in step))
                o[c] = o[c] * decay + partial  # flushed to full precision
        output.append([x / 448.0 / total * s + m for x, s, m in zip(o, v_scales, v_mean, strict=True)])
    return output


def given():
    q, k, v = randn(1, HEADS, ROWS, WIDTH), randn(1, HEADS, KEYS, WIDTH), randn(1, HEADS, KEYS, VALUES)
    return q + randn(1, HEADS, 1, WIDTH), k + 3 * randn(1, HEADS, 1, WIDTH), v + randn(1, HEADS, 1, VALUES)


@pytest.mark.parametrize("mask", ["", " causal"])
@pytest.mark.parametrize(("kind", "add", "v_top"), [("fp32", float, 448.0), ("fp22", fp22, 448.0), ("fp16", fp16, 2.25)])
@pytest.mark.parametrize(("storage", "top"), [("int4", 7), ("int8", 127)])
def test_it_is_sage_attention(storage, top, kind, add, v_top, mask):
    q, k, v = given()
    line = f"softmax scale({SCALE!r}){mask} precision({FULL.replace('int4', storage)}, sum={kind})"
    heads = [
        sage(*(x[0, h].tolist() for x in (q, k, v)), top=top, q_block=16, add=add, v_top=v_top, causal=bool(mask))
        for h in range(HEADS)
    ]
    close(reference(line, q, k, v)[0], torch.tensor(heads, dtype=torch.float64), 1e-9)


def test_smoothing_alone_changes_nothing():
    q, k, v = given()
    line = f"softmax scale({SCALE!r}) causal precision({FULL.replace('int4', 'fp32').replace('fp8', 'fp32')})"
    close(reference(line, q, k, v), reference(f"softmax scale({SCALE!r}) causal", q, k, v))


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def test_keys_with_large_channels_need_smoothing():
    """The entry's own check: a per-channel offset of ten standard deviations."""
    q, k, v = randn(1, 2, 256, 64), randn(1, 2, 256, 64) + 10 * randn(1, 1, 1, 64), randn(1, 2, 256, 64)
    plain = reference("softmax scale(0.125)", q, k, v)
    line = f"softmax scale(0.125) precision(q=int4, k=int4, {PER_THREAD}{{}})"
    smooth, rough = (reference(line.format(x), q, k, v) for x in (", q_smooth=row // 128, k_smooth=0", ""))
    assert cosine(smooth, plain) > 0.97 > 0.9 > cosine(rough, plain)
    finer = reference(line.format(", k_smooth=0").replace("int4", "int8"), q, k, v)
    assert cosine(finer, plain) > 0.9999 > cosine(smooth, plain)


def test_finer_groups_lose_less():
    q, k, v = randn(1, 4, 256, 64), randn(1, 4, 256, 64), randn(1, 4, 256, 64)
    plain = reference("softmax scale(0.125)", q, k, v)
    groups = ("q_group=row // 128, k_group=k // 64", "q_group=row // 32, k_group=k // 64", PER_THREAD)
    errors = [(reference(f"softmax scale(0.125) precision(q=int4, k=int4, {g})", q, k, v) - plain).norm() for g in groups]
    assert errors == sorted(errors, reverse=True)


def test_weights_are_rounded_as_parts_of_the_largest():
    q, k, v = given()
    s = q @ k.mT
    p = (s - s.amax(-1, keepdim=True)).exp()
    expected = p.half().double() @ v.half().double() / p.sum(-1, keepdim=True)
    close(reference("softmax precision(p=fp16, v=fp16)", q, k, v), expected)
