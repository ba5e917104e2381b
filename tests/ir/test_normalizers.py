"""Normalisers, linear attention and recurrences against formulas written on their own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from ir.operands import B, D, E, H, Q, close, positions, qkv, rand, randn, turn

from attnopt.ir.reference import attend, reference


def test_sigmoid():
    q, k, v = qkv()
    i, j = positions()
    weights = (1 / (1 + (-(q @ k.mT) * 0.5 + math.log(Q)).exp())).masked_fill(j > i, 0)
    close(reference(f"sigmoid scale(0.5) add({-math.log(Q)}) causal", q, k, v), weights @ v)


def test_signed_softmax():
    q, k, v = qkv()
    i, j = positions()
    s = q @ k.mT
    size = s.abs().exp().masked_fill(j > i, 0)
    weights = attend("signed_softmax causal", q, k, v).weights
    close(weights, s.sign() * size / size.sum(-1, keepdim=True))
    close(weights.abs().sum(-1), torch.ones(B, H, Q, dtype=torch.float64))
    close(reference("signed_softmax", q.abs(), k.abs(), v), reference("softmax", q.abs(), k.abs(), v))


def test_zscore():
    q, k, v = qkv()
    s = q @ k.mT
    gain, shift = randn(H), randn(H)
    standard = (s - s.mean(-1, keepdim=True)) / (s.var(-1, keepdim=True, unbiased=False) + 1e-8).sqrt()
    expected = (gain[:, None, None] * standard + shift[:, None, None]) @ v
    close(reference("zscore(gain=load(g, h), shift=load(s, h))", q, k, v, g=gain, s=shift), expected)
    # Weights sum to zero: a constant in the values is invisible.
    close(reference("zscore", q, k, v + randn(1, 1, 1, E)), reference("zscore", q, k, v), 1e-10)
    seen = s[:, :, 5, :6]
    standard = (seen - seen.mean(-1, keepdim=True)) / (seen.var(-1, keepdim=True, unbiased=False) + 1e-8).sqrt()
    close(attend("zscore causal", q, k, v).weights[:, :, 5, :6], standard)


def test_sinkhorn():
    q, k, v = qkv()
    close(reference("sinkhorn(1) scale(0.3)", q, k, v), reference("softmax scale(0.3)", q, k, v))
    plan = (0.3 * q @ k.mT).exp()
    for _ in range(2):
        plan = plan / plan.sum(-1, keepdim=True)
        plan = plan / plan.sum(-2, keepdim=True)
    plan = plan / plan.sum(-1, keepdim=True)
    close(attend("sinkhorn(5) scale(0.3)", q, k, v).weights, plan)
    settled = attend("sinkhorn(301) scale(0.3)", q, k, v).weights
    one = torch.ones(B, H, Q, dtype=torch.float64)
    close(settled.sum(-1), one)
    close(settled.sum(-2), one, 1e-8)
    wide = attend("sinkhorn(301) scale(0.3)", *qkv(6, 9)).weights
    close(wide.sum(-2), torch.full((B, H, 9), 6 / 9, dtype=torch.float64), 1e-8)


def test_orthogonal_is_doubly_stochastic_and_ignores_scale():
    q, k, v = qkv(6, 6)
    weights = attend("orthogonal", q, k, v).weights
    one = torch.ones(B, H, 6, dtype=torch.float64)
    close(weights.sum(-1), one)
    close(weights.sum(-2), one)
    close(weights, attend("orthogonal scale(3.0)", q, k, v).weights)


def test_birkhoff_is_the_nearest_doubly_stochastic_matrix():
    q, k, v = qkv(5, 5)
    s = 0.3 * q @ k.mT
    nearest = attend("birkhoff(4000) scale(0.3)", q, k, v).weights
    one = torch.ones(B, H, 5, dtype=torch.float64)
    close(nearest.sum(-1), one, 1e-6)
    close(nearest.sum(-2), one, 1e-6)
    assert nearest.min() >= 0
    # A projection makes an obtuse angle with every other point; permutations are the corners of the set.
    for order in itertools.permutations(range(5)):
        corner = torch.eye(5, dtype=torch.float64)[list(order)]
        assert ((s - nearest) * (corner - nearest)).sum((-1, -2)).max() < 1e-5


@pytest.mark.parametrize("order", [1, 2, 4])
def test_polynomial(order):
    q, k, v = qkv()
    i, j = positions()
    s = 0.1 * q @ k.mT
    taylor = sum(s**n / math.factorial(n) for n in range(order + 1)).masked_fill(j > i, 0)
    close(reference(f"polynomial({order}) scale(0.1) causal", q, k, v), taylor / taylor.sum(-1, keepdim=True) @ v)
    # The factored form of order 2: moments of the keys instead of pairs.
    if order == 2:
        one = torch.ones(B, H, Q, 1, dtype=torch.float64)

        def moments(x):
            second = torch.einsum("bhjc,bhjd,bhje->bhcde", k, k, x)
            return x.sum(2, keepdim=True) + 0.1 * q @ (k.mT @ x) + 0.005 * torch.einsum("bhic,bhid,bhcde->bhie", q, q, second)

        close(reference("polynomial(2) scale(0.1)", q, k, v), moments(v) / moments(one))
    exact = reference("softmax scale(0.1)", q, k, v)
    close(reference("polynomial(20) scale(0.1)", q, k, v), exact, 1e-9)


def test_kolmogorov():
    q, k, v = qkv(5, 7)
    rank, waves = 3, 2
    cos, sin, lift = randn(H, rank, 7, waves), randn(H, rank, 7, waves), randn(H, 7, rank)
    s = q @ k.mT
    weights = torch.zeros(B, H, 5, 7, dtype=torch.float64)
    for p in range(rank):
        waved = ((cos[:, p, None, :, g], sin[:, p, None, :, g], (g + 1) * s) for g in range(waves))
        phi = sum(a * x.cos() + b * x.sin() for a, b, x in waved)
        weights += phi.sum(-1, keepdim=True) * lift[:, :, p][:, None]
    close(reference("kolmogorov", q, k, v, fourier_cos=cos, fourier_sin=sin, fourier_lift=lift), weights @ v)


def test_routing():
    q, k, v = qkv()
    everyone = randn(1, 1, D)
    close(reference("routed(12, centroids=c)", q, k, v, c=everyone), reference("softmax", q, k, v))
    centroids = randn(H, 3, D)
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (q, k)]
    total, count = torch.zeros(B, H, Q, E, dtype=torch.float64), torch.zeros(B, H, Q, 1, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for c in range(3):
                mine, keys = ((x[b, h] @ centroids[h, c]).argsort(descending=True)[:4] for x in unit)
                total[b, h, mine] += (q[b, h, mine] @ k[b, h, keys].mT).softmax(-1) @ v[b, h, keys]
                count[b, h, mine] += 1
    close(reference("routed(4, centroids=c) empty(zero)", q, k, v, c=centroids), total / count.clamp(min=1))


@pytest.mark.parametrize("feature", ["elu1", "relu", "exp", "hedgehog"])
def test_linear_attention_is_a_product_of_sums(feature):
    q, k, v = qkv()
    phi = {
        "elu1": lambda x: torch.where(x > 0, x + 1, x.exp()),
        "relu": lambda x: x.clamp(min=0),
        "exp": lambda x: x.exp(),
        "hedgehog": lambda x: torch.cat([x.softmax(-1), (-x).softmax(-1)], -1),
    }[feature]
    a, b = phi(q), phi(k)
    close(reference(f"linear({feature})", q, k, v), a @ (b.mT @ v) / (a @ b.sum(2)[..., None]))


def test_causal_linear_attention_is_a_running_sum():
    q, k, v = qkv()
    a, b = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
    state, norm, rows = torch.zeros(B, H, D, E, dtype=torch.float64), torch.zeros(B, H, D, dtype=torch.float64), []
    for t in range(Q):
        state = state + b[:, :, t, :, None] * v[:, :, t, None]
        norm = norm + b[:, :, t]
        rows.append(torch.einsum("bhd,bhde->bhe", a[:, :, t], state) / (a[:, :, t] * norm).sum(-1, keepdim=True))
    expected = torch.stack(rows, 2)
    close(reference("linear(elu1) causal", q, k, v), expected)
    unnormalised = reference("linear(elu1, denominator=none) causal", q, k, v)
    close(unnormalised, reference("recurrent(feature=elu1)", q, k, v))
    close(reference("recurrent(feature=elu1) offset(9)", q[:, :, 9:], k, v), unnormalised[:, :, 9:])


def test_linear_denominators():
    q, k, v = (x.abs() for x in qkv())
    s = q @ k.mT
    total = s.sum(-1, keepdim=True)
    bound = float(total.median())
    close(reference(f"linear(identity, floor={bound})", q, k, v), s / total.clamp(min=bound) @ v)
    close(reference("linear(identity, eps=0.5 * size(k))", q, k, v), s / (total + 0.5 * Q) @ v)
    small, z = s * 0.01, (s * 0.01).sum(-1, keepdim=True)
    weights = attend("linear(identity, denominator=magnitude) scale(0.01)", q, k, v).weights
    close(weights, (1 + 1 / z) * small - z / Q)
    close(weights.sum(-1, keepdim=True), torch.ones_like(z))


def test_rotary_on_features_leaves_the_denominator():
    q, k, v = qkv()
    phi = [torch.where(x > 0, x + 1, x.exp()) for x in (q, k)]
    at = torch.arange(Q, dtype=torch.float64)
    weights = turn(phi[0], at) @ turn(phi[1], at).mT / (phi[0] @ phi[1].mT).sum(-1, keepdim=True)
    close(reference("linear(elu1) rotary(8, pairs=interleaved, on=features)", q, k, v), weights @ v)


def test_focused_features_keep_the_norm_of_a_token():
    q, k, v = (x.abs() for x in qkv())
    spread = rand(D) + 0.5

    def focus(x):
        x = (x + 1e-6) / spread
        flat = x.transpose(1, 2).flatten(2)
        power = flat**3
        return (power * flat.norm(dim=-1, keepdim=True) / power.norm(dim=-1, keepdim=True)).unflatten(2, (H, D)).transpose(1, 2)

    a, b = focus(q), focus(k)
    expected = a @ (b.mT @ v) / (a @ b.sum(2)[..., None] + 1e-6 * Q)
    close(reference("linear(focused, spread=s, eps=1e-6 * size(k))", q, k, v, s=spread), expected)


def test_split_features():
    q, k, v = qkv()
    length = q.norm(dim=-1, keepdim=True)
    power = 3 * (0.5 + torch.tanh(length))
    cubed = k**3
    a = torch.cat([(q.clamp(min=0) / length) ** power, ((-q).clamp(min=0) / length) ** power], -1)
    b = torch.cat([cubed.clamp(min=0), (-cubed).clamp(min=0)], -1)
    close(reference("linear(norm_split)", q, k, v), a @ (b.mT @ v) / (a @ b.sum(2)[..., None]))


def test_keys_reweighed_by_the_mean_query():
    q, k, v = qkv()
    a, b = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
    alpha = Q * (a.mean(2, keepdim=True) @ b.mT * D**-0.5).softmax(-1)
    b = alpha.mT * b
    close(reference("linear(elu1, reweigh=mean_query)", q, k, v), a @ (b.mT @ v) / (a @ b.sum(2)[..., None]))


def test_safe_exponentials():
    q, k, v = qkv()
    a, b = (q - q.amax(-1, keepdim=True)).exp(), (k - k.amax((2, 3), keepdim=True)).exp()
    close(reference("linear(safe_exp, denominator=none)", q, k, v), a @ (b.mT @ v))
    close(reference("linear(safe_exp)", q, k, v), reference("linear(exp)", q, k, v))


@pytest.mark.parametrize("decay", ["0.9", "load(g, h)", "load(a, b, h, k)"])
def test_decay_is_a_mask_of_powers(decay):
    q, k, v = qkv()
    g, a = rand(H), rand(B, H, Q)
    kept = {"0.9": torch.full((B, H, Q), 0.9, dtype=torch.float64), "load(g, h)": g[:, None].expand(B, H, Q)}.get(decay, a)
    total = kept.log().cumsum(-1)
    i, j = positions()
    weights = (q @ k.mT) * (total[..., :, None] - total[..., None, :]).exp().masked_fill(j > i, 0)
    close(reference(f"recurrent(decay={decay})", q, k, v, g=g, a=a), weights @ v, 1e-10)


def delta_rule(q, k, v, beta, alpha):
    state, rows = torch.zeros(B, H, D, E, dtype=torch.float64), []
    for t in range(q.shape[2]):
        key, eye = k[:, :, t], torch.eye(D, dtype=torch.float64)
        erase = eye - beta[:, :, t, None, None] * key[..., :, None] * key[..., None, :]
        state = alpha[:, :, t, None, None] * (erase @ state) + beta[:, :, t, None, None] * key[..., :, None] * v[:, :, t, None]
        rows.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(rows, 2)


def test_delta_rule():
    q, k, v = qkv()
    beta, alpha, one = rand(B, H, Q), rand(B, H, Q), torch.ones(B, H, Q, dtype=torch.float64)
    unit = [F.normalize(F.silu(x), dim=-1) for x in (q, k)]
    line = "recurrent(feature=silu, unit=l2, erase=load(beta, b, h, k), write=load(beta, b, h, k))"
    close(reference(line, q, k, v, beta=beta), delta_rule(*unit, v, beta, one))
    gated = line.replace("recurrent(", "recurrent(decay=load(alpha, b, h, k), ")
    close(reference(f"{gated} scale(0.5)", q, k, v, beta=beta, alpha=alpha), 0.5 * delta_rule(*unit, v, beta, alpha))
    # Orthonormal keys overwrite: each reads back what it wrote.
    keys = torch.linalg.qr(randn(B, H, D, D))[0]
    close(reference("recurrent(erase=1.0)", keys, keys, v[:, :, :D])[:, :, -1], v[:, :, D - 1])


def test_dpfp_features():
    q, k, v = qkv()

    def phi(x):
        r = torch.cat([x.clamp(min=0), (-x).clamp(min=0)], -1)
        parts = [r[..., i] * r[..., (i - n) % (2 * D)] for n in (1, 2) for i in range(2 * D)]
        x = torch.stack(parts, -1)
        return x / x.sum(-1, keepdim=True)

    state = torch.zeros(B, H, 4 * D, E, dtype=torch.float64)
    a, b, rows = phi(q), phi(k), []
    for t in range(Q):
        old = b[:, :, t, None] @ state
        state = state + 0.5 * b[:, :, t, :, None] * (v[:, :, t, None] - old)
        rows.append((a[:, :, t, None] @ state)[:, :, 0])
    line = "recurrent(feature=dpfp, order=2, unit=l1, erase=0.5, write=0.5)"
    close(reference(line, q, k, v), torch.stack(rows, 2))


def test_a_key_held_for_a_time_is_a_matrix_exponential():
    q, k, v = qkv()
    beta = rand(B, H, Q)
    state, rows = torch.zeros(B, H, D, E, dtype=torch.float64), []
    for t in range(Q):
        kk = k[:, :, t, :, None] * k[:, :, t, None]
        # d/dtau [S; v'] = [[-kk', k], [0, 0]] [S; v'] over a time beta.
        flow = torch.zeros(B, H, D + 1, D + 1, dtype=torch.float64)
        flow[..., :D, :D], flow[..., :D, D] = -kk, k[:, :, t]
        moved = torch.matrix_exp(beta[:, :, t, None, None] * flow) @ torch.cat([state, v[:, :, t, None]], 2)
        state = moved[..., :D, :]
        rows.append((q[:, :, t, None] @ state)[:, :, 0])
    line = "recurrent(step=exact, erase=load(beta, b, h, k), write=load(beta, b, h, k))"
    close(reference(line, q, k, v, beta=beta), torch.stack(rows, 2), 1e-10)


def test_channel_decays_and_rank_one_transitions():
    q, k, v = qkv()
    w, kappa, a = rand(B, H, Q, D), F.normalize(randn(B, H, Q, D), dim=-1), rand(B, H, Q, D)
    gate = rand(B, H, Q, E)
    state, rows = torch.zeros(B, H, E, D, dtype=torch.float64), []  # values x keys
    for t in range(Q):
        removed = (state @ -kappa[:, :, t, :, None]) @ (kappa * a)[:, :, t, None]
        state = state * w[:, :, t, None] + removed + v[:, :, t, :, None] @ k[:, :, t, None]
        rows.append((state @ q[:, :, t, :, None])[..., 0])
    line = "recurrent(erase=1.0, erase_from=previous, key_decay=w, erase_read=kappa, erase_write=ka)"
    close(reference(line, q, k, v, w=w, kappa=kappa, ka=kappa * a), torch.stack(rows, 2))
    state, rows = torch.zeros(B, H, E, D, dtype=torch.float64), []
    for t in range(Q):
        state = gate[:, :, t, :, None] * state + v[:, :, t, :, None] * k[:, :, t, None]
        rows.append(0.25 * (state @ q[:, :, t, :, None])[..., 0])
    close(reference("recurrent(value_decay=f) scale(0.25)", q, k, v, f=gate), torch.stack(rows, 2))
