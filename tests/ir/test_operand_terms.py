"""Norms, positions and score terms against formulas written on their own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from ir.operands import B, D, E, H, Q, close, positions, qkv, randn, turn

from attnopt.ir.reference import attend, reference

HALVES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # channel i beside channel i + D/2


@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_rotary(base):
    q, k, v = qkv(5, 9)
    at_q, at_k = torch.arange(5.0, dtype=torch.float64) + 4, torch.arange(9.0, dtype=torch.float64)
    scores = turn(q, at_q, base) @ turn(k, at_k, base).mT
    close(reference(f"softmax offset(4) rotary(8, base={base}, pairs=interleaved)", q, k, v), scores.softmax(-1) @ v)
    scores = turn(q[..., HALVES], at_q, base) @ turn(k[..., HALVES], at_k, base).mT
    close(reference(f"softmax offset(4) rotary(8, base={base})", q, k, v), scores.softmax(-1) @ v)


def test_rotary_of_some_channels_at_given_positions():
    q, k, v = qkv()
    place = torch.randint(0, 50, (B, Q))
    scores = torch.stack(
        [
            turn(q[b, ..., 2:6], place[b].double()) @ turn(k[b, ..., 2:6], place[b].double()).mT
            + q[b][..., [0, 1, 6, 7]] @ k[b][..., [0, 1, 6, 7]].mT
            for b in range(B)
        ]
    )
    line = "softmax rotary(4, first=2, pairs=interleaved, q=load(ids, b, row), k=load(ids, b, k))"
    close(reference(line, q, k, v, ids=place), scores.softmax(-1) @ v)


def test_rotary_angles_from_a_table_or_frequencies():
    q, k, v = qkv()
    frequencies = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    table = torch.arange(Q)[:, None] * frequencies
    plain = reference("softmax rotary(8)", q, k, v)
    close(reference("softmax rotary(8, angles=f)", q, k, v, f=frequencies), plain)
    close(reference("softmax rotary(8, angles=f)", q, k, v, f=table), plain)
    assert (reference("softmax rotary(8, angles=f)", q, k, v, f=2 * table) - plain).abs().max() > 1e-3


def test_rotated_values_depend_on_distance_only():
    q, k, v = qkv(value_width=D)
    line = "softmax rotary(8, values=yes, pairs=interleaved) causal"
    at = torch.arange(Q, dtype=torch.float64)
    weights = attend("softmax rotary(8, pairs=interleaved) causal", q, k, v).weights
    close(reference(line, q, k, v), turn(weights @ turn(v, at), -at))
    close(reference(line.replace("rotary(8,", "rotary(8, q=q + 5, k=k + 5,"), q, k, v), reference(line, q, k, v))


@pytest.mark.parametrize("kind", ["l2", "rms", "layer"])
def test_normalised_queries_and_keys(kind):
    q, k, v = qkv(key_heads=2)
    gain, temperature = randn(D), randn(2, 1)

    def norm(x):
        if kind == "l2":
            return x / x.square().sum(-1, keepdim=True).sqrt()
        if kind == "rms":
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    scores = (norm(q) * gain) @ (norm(k) * temperature[:, None]).repeat_interleave(2, 1).mT
    line = f"softmax norm({kind}, q_gain=g, k_gain=t)"
    close(reference(line, q, k, v, g=gain, t=temperature), scores.softmax(-1) @ v.repeat_interleave(2, 1))
    if kind != "layer":
        close(
            reference(f"softmax norm({kind}, eps=0.0)", 7 * q, k, v),
            reference(f"softmax norm({kind}, eps=0.0)", q, k, v),
        )


def test_only_one_side_may_be_normalised():
    q, k, v = qkv()
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (q, k)]
    close(reference("softmax norm(l2, on=k)", q, k, v), (q @ unit[1].mT).softmax(-1) @ v)
    close(reference("softmax norm(l2, on=q)", q, k, v), (unit[0] @ k.mT).softmax(-1) @ v)


def test_rows_relative_to_the_longest():
    q, k, v = qkv()
    line = "softmax norm(longest, center=yes)"
    centred = [x - x.mean(-1, keepdim=True) for x in (q, k)]
    scaled = [x / x.norm(dim=-1).amax(-1)[..., None, None] for x in centred]
    close(reference(line, q, k, v), (scaled[0] @ scaled[1].mT).softmax(-1) @ v)


def test_gaussian_kernels_are_products_with_a_key_bias():
    q, k, v = qkv()
    distance = torch.cdist(q, k).square()
    expected = (-0.25 * distance).softmax(-1) @ v
    close(reference("softmax scale(0.5) add_square(k, -0.25)", q, k, v), expected)
    close(reference("softmax scale(0.5) add_square(k, -0.25) add_square(q, -0.25)", q, k, v), expected)


def test_convolved_scores_and_mixed_heads():
    q, k, v = qkv()
    kernel, again, mixing, late = randn(H, 2, 3), randn(H, 2, 3), randn(H, H), randn(H, H)
    i, j = positions()

    def blur(x, w):
        out = torch.zeros_like(x)
        for row in range(Q):
            for key in range(Q):
                for a in range(2):
                    for b in range(3):
                        r, c = row - 1 + a, key - 1 + b
                        if r >= 0 and 0 <= c < Q:
                            out[:, :, row, key] += w[:, a, b] * x[:, :, r, c]
        return out

    s = blur((q @ k.mT).masked_fill(j > i, 0), kernel)
    s = torch.einsum("hg,bgij->bhij", mixing, s.masked_fill(j > i, 0))
    p = s.masked_fill(j > i, -torch.inf).softmax(-1)
    p = torch.einsum("hg,bgij->bhij", late, blur(p, again).masked_fill(j > i, 0))
    line = "softmax conv(w) mix(m) causal weight_conv(u) weight_mix(n)"
    got = reference(line, q, k, v, w=kernel, m=mixing, u=again, n=late)
    close(got, p @ v)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 8:] += 1
    close(reference(line, *changed, w=kernel, m=mixing, u=again, n=late)[:, :, :8], got[:, :, :8])


def test_what_is_added_to_mixed_weights_stays_at_visible_keys():
    q, k, v = qkv()
    mixing, bias = randn(H, H), randn(H)
    i, j = positions()
    p = torch.einsum("hg,bgij->bhij", mixing, (q @ k.mT).masked_fill(j > i, -torch.inf).softmax(-1)) + bias[:, None, None]
    close(reference("softmax causal weight_mix(m, bias=c)", q, k, v, m=mixing, c=bias), p.masked_fill(j > i, 0) @ v)


@pytest.mark.parametrize("window", [0, 3])
def test_lookahead_keys_are_a_recurrence(window):
    q, k, v = qkv(value_width=D)
    lq, lk, lv = randn(B, H, Q, D), randn(B, H, Q, D), randn(B, H, Q, D)
    c = D**-0.5
    learned, rows = torch.zeros(B, H, Q, D, dtype=torch.float64), []
    for t in range(Q):
        gate = torch.sigmoid(c * (lq[:, :, :t] * lk[:, :, t, None]).sum(-1, keepdim=True))
        if window:
            gate[:, :, : max(0, t - window)] = 0
        learned[:, :, :t] += gate * lv[:, :, t, None]
        logits = c * (k[:, :, : t + 1] * q[:, :, t, None]).sum(-1) - F.silu(
            c * (learned[:, :, : t + 1] * q[:, :, t, None]).sum(-1)
        )
        rows.append((logits.softmax(-1)[..., None] * v[:, :, : t + 1]).sum(2))
    line = f"softmax scale({c}) lookahead_keys({c}, window={window}) causal"
    close(reference(line, q, k, v, lookahead_q=lq, lookahead_k=lk, lookahead_v=lv), torch.stack(rows, 2))


def test_pyramid_levels_pool_keys_with_a_log_count():
    q, k, v = qkv(8, 8)
    levels = torch.tensor([[1, 4], [2, 0]]).expand(1, 1, 2, 2)

    def pool(x, p):
        return x.unflatten(2, (-1, p)).mean(3)

    top_k, top_v = torch.cat([k[:, :, :4], pool(k[:, :, 4:], 4)], 2), torch.cat([v[:, :, :4], pool(v[:, :, 4:], 4)], 2)
    bias = torch.tensor([0, 0, 0, 0, math.log(4)], dtype=torch.float64)
    top = (0.3 * q[:, :, :4] @ top_k.mT + bias).softmax(-1) @ top_v
    low_k, low_v = pool(k[:, :, :4], 2), pool(v[:, :, :4], 2)
    low = (0.3 * q[:, :, 4:] @ low_k.mT + math.log(2)).softmax(-1) @ low_v
    got = reference("softmax scale(0.3) pyramid(4, 4, levels=l)", q, k, v, l=levels)
    close(got, torch.cat([top, low], 2))


def test_products_of_two_keys():
    q, k, v = qkv(5, 3)
    other_k, other_v = randn(B, H, 4, D), randn(B, H, 4, E)
    logits = torch.einsum("bhic,bhjc,bhkc->bhijk", q, k, other_k)
    weights = logits.flatten(3).softmax(-1).unflatten(3, (3, 4))
    expected = torch.einsum("bhijk,bhje,bhke->bhie", weights, v, other_v)
    close(reference("softmax pair_keys(k2, v2)", q, k, v, k2=other_k, v2=other_v), expected)


def test_attention_through_agents():
    q, k, v = qkv()
    agents, first, second = randn(B, H, 3, D), randn(H, 3, Q), randn(H, Q, 3)
    gathered = (0.5 * agents @ k.mT + first).softmax(-1) @ v
    expected = (0.25 * q @ agents.mT + second).softmax(-1) @ gathered
    line = "softmax scale(0.25) add(load(b2, h, q, k)) through(agents, softmax scale(0.5) add(load(b1, h, q, k)))"
    close(reference(line, q, k, v, agents=agents, b1=first, b2=second), expected)


def test_gates_scale_rows_and_other_attentions_are_added():
    q, k, v = qkv()
    gate, other_k, other_v = randn(B, H, Q), randn(B, H, 5, D), randn(B, H, 5, E)
    expected = gate[..., None] * ((q @ k.mT).softmax(-1) @ v) + 0.5 * ((q @ other_k.mT).softmax(-1) @ other_v)
    line = "softmax gate(load(g, b, h, row)) plus(0.5, softmax, k=ok, v=ov)"
    close(reference(line, q, k, v, g=gate, ok=other_k, ov=other_v), expected)


def test_value_scales_act_after_the_normaliser():
    q, k, v = qkv()
    scale = randn(B, H, Q)
    expected = (q @ k.mT).softmax(-1) @ (scale[..., None] * v)
    close(reference("softmax value_scale(load(t, b, h, k))", q, k, v, t=scale), expected)
