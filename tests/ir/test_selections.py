"""Selections against the keys that a loop or a sort picks, and dense attention where they pick all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ir.operands import B, D, H, Q, close, masked, positions, qkv, randn

from attnopt.ir.reference import attend, reference


@pytest.mark.parametrize(
    "selection",
    [
        "top_keys(12)",
        "block_topk(3, 4)",
        "pages(4, 3)",
        "compressed_topk(4, 3)",
        "sparsek(12, 0.0)",
        "keep(12)",
        "pooled_blocks(4, 4, mass=2.0)",
        "pooled_blocks(4, 4, share=1.0)",
        "pooled_blocks(4, 4, similarity=1.0)",
    ],
)
@pytest.mark.parametrize("mask", ["", " causal", " causal & window(5)"])
def test_selecting_everything_is_dense(selection, mask):
    q, k, v = qkv(key_heads=2)
    close(reference(f"softmax scale(0.3){mask} {selection}", q, k, v), reference(f"softmax scale(0.3){mask}", q, k, v))


def test_top_keys():
    q, k, v = qkv()
    i, j = positions()
    s = (q @ k.mT).masked_fill(j > i, -torch.inf)
    bar = s.sort(-1, descending=True).values[..., 2:3]
    close(reference("softmax causal top_keys(3)", q, k, v), masked(q, k, v, (s >= bar) & (j <= i)))


def test_top_keys_by_proxies():
    q, k, v = qkv()
    i, j = positions()
    basis = torch.linalg.qr(randn(H, D, D))[0]
    close(
        reference("softmax causal top_keys(3, basis=p)", q, k, v, p=basis),
        reference("softmax causal top_keys(3)", q, k, v),
    )
    low = ((q @ basis[..., :2]) @ (k @ basis[..., :2]).mT).masked_fill(j > i, -torch.inf)
    expected = masked(q, k, v, (low >= low.sort(-1, descending=True).values[..., 2:3]) & (j <= i))
    close(reference("softmax causal top_keys(3, basis=p)", q, k, v, p=basis[..., :2]), expected)
    query, key = randn(B, H, Q, 2), randn(B, H, Q, 2)
    old = (query @ key.mT).masked_fill((j > i - 2), -torch.inf)
    seen = ((old >= old.sort(-1, descending=True).values[..., 2:3]) & (old > -torch.inf)) | ((j <= i) & (i - j < 2))
    got = reference("softmax causal top_keys(3, query=a, key=c, recent=2)", q, k, v, a=query, c=key)
    close(got, masked(q, k, v, seen))


def test_sparsek_weighs_values_by_a_projection():
    q, k, v = qkv()
    u = randn(B, H, Q)
    weights = attend("softmax sparsek(4, load(u, b, h, k))", q, k, v, u=u).weights
    kept = u >= u.sort(-1, descending=True).values[..., 3:4]
    plain = (q @ k.mT).masked_fill(~kept[:, :, None], -torch.inf).softmax(-1)
    m = torch.where(kept[:, :, None], weights / plain, 0.0)[:, :, 0]
    assert m.min() >= 0 and m.max() <= 1 + 1e-12
    # tau by the breakpoints of the sum, which is linear between them.
    tau = torch.zeros(B, H, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            points = torch.cat([u[b, h], u[b, h] - 1]).sort().values
            sums = torch.stack([(u[b, h] - p).clamp(0, 1).sum() for p in points])
            at = int((sums >= 4).nonzero().max())
            lo, hi = points[at], points[at + 1]
            tau[b, h] = lo + (sums[at] - 4) / (sums[at] - sums[at + 1]) * (hi - lo)
    close(m, (u - tau[..., None]).clamp(0, 1) * kept, 1e-10)


def test_sparsek_with_recent_keys_leaves_their_values_alone():
    q, k, v = qkv()
    u = 10 * torch.arange(Q, 0, -1, dtype=torch.float64)  # far apart: the projection keeps the first two whole
    i, j = positions()
    seen = (j <= i) & ((i - j < 3) | (j < 2))
    close(reference("softmax causal sparsek(2, load(u, k), recent=3)", q, k, v, u=u), masked(q, k, v, seen))


def test_block_topk():
    q, k, v = qkv()
    gate = torch.stack([(q * k[:, :, 3 * c : 3 * c + 3].mean(2, keepdim=True)).sum(-1) for c in range(4)], -1)
    seen = torch.zeros(B, H, Q, Q, dtype=torch.bool)
    for row in range(Q):
        own = row // 3
        past = gate[:, :, row, :own]
        best = past.argmax(-1) if own else torch.zeros(B, H, dtype=torch.long)
        for key in range(row + 1):
            seen[:, :, row, key] = (key // 3 == own) | (key // 3 == best)
    close(reference("softmax causal block_topk(3, 2)", q, k, v), masked(q, k, v, seen))
    changed = k.clone()
    changed[:, :, 9:] += 3
    close(reference("softmax causal block_topk(3, 2)", q, changed, v)[:, :, :9], masked(q, k, v, seen)[:, :, :9])


def test_block_topk_with_a_shared_probe():
    q, k, v = qkv()
    mean = q.unflatten(2, (4, 3)).mean(3, keepdim=True).expand(-1, -1, -1, 3, -1).flatten(2, 3)
    means = k.unflatten(2, (4, 3)).mean(3)
    best = (mean @ means.mT).masked_fill(torch.arange(4) == (torch.arange(Q) // 3)[:, None], -torch.inf).argmax(-1)
    own = (torch.arange(Q) // 3)[:, None]
    seen = (torch.arange(Q) // 3 == best[..., None]) | (torch.arange(Q) // 3 == own)
    close(reference("softmax block_topk(3, 2, rows=3)", q, k, v), masked(q, k, v, seen))
    # An outlier takes over the probe; equal queries leave the mean.
    same = q[:, :, :1].expand_as(q)
    line = "softmax block_topk(3, 2, rows=3, probe=activation)"
    close(reference(line, same, k, v), reference("softmax block_topk(3, 2, rows=3)", same, k, v))


def test_pages_rank_by_an_upper_bound():
    q, k, v = qkv(1, 12)
    bound = torch.zeros(B, H, 3, dtype=torch.float64)
    for page in range(3):
        keys = k[:, :, 4 * page : 4 * page + 4]
        for channel in range(D):
            low, high = keys[..., channel].min(-1).values, keys[..., channel].max(-1).values
            bound[..., page] += torch.maximum(q[:, :, 0, channel] * low, q[:, :, 0, channel] * high)
    assert (bound >= (q @ k.mT)[:, :, 0].unflatten(-1, (3, 4)).amax(-1)).all()
    seen = (bound >= bound.sort(-1).values[..., 1:2]).repeat_interleave(4, -1)[:, :, None]
    close(reference("softmax pages(4, 2)", q, k, v), masked(q, k, v, seen))


def test_pages_of_one_key_are_top_keys():
    q, k, v = qkv()
    close(reference("softmax causal pages(1, 4)", q, k, v), reference("softmax causal top_keys(4)", q, k, v))


def test_compressed_topk_agrees_in_a_group():
    q, k, v = qkv(key_heads=2)
    i, j = positions()
    means = k.unflatten(2, (6, 2)).mean(3).repeat_interleave(2, 1)
    done = (torch.arange(6) + 1) * 2 - 1 <= torch.arange(Q)[:, None]
    chance = (0.3 * q @ means.mT).masked_fill(~done, -torch.inf).softmax(-1).nan_to_num()
    chance = chance.unflatten(1, (2, 2)).mean(2).repeat_interleave(2, 1)
    block, own = torch.arange(6), (torch.arange(Q) // 2)[:, None]
    forced = (block == 0) | (block == own) | (block == own - 1)
    ranked = chance.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)
    seen = (ranked >= ranked.sort(-1, descending=True).values[..., 3:4]).repeat_interleave(2, -1) & (j <= i)
    wide = v.repeat_interleave(2, 1)
    expected = masked(q, k.repeat_interleave(2, 1), wide, seen, 0.3)
    close(reference("softmax scale(0.3) causal compressed_topk(2, 4)", q, k, v), expected)


def test_blocks_from_an_operand():
    q, k, v = qkv()
    tiles = torch.rand(1, H, 3, 4) < 0.5
    tiles[..., 0] = True
    seen = tiles.repeat_interleave(4, 2).repeat_interleave(3, 3)
    close(reference("softmax blocks(4, 3, operand=t)", q, k, v, t=tiles), masked(q, k, v, seen))


def test_pooled_blocks_keep_the_mass_they_promise():
    q, k, v = (x.repeat_interleave(4, 2) for x in qkv(6, 6))
    dense = attend("softmax scale(0.3)", q, k, v).weights
    seen = attend("softmax scale(0.3) pooled_blocks(4, 4, mass=0.8, similarity=-1.0)", q, k, v).weights > 0
    mass = (dense * seen).sum(-1)
    assert mass.min() >= 0.8 - 1e-12
    assert seen.double().mean() < 1
    for row in range(24):  # the fewest tiles: without its lightest tile a row falls below
        tiles = (dense * seen)[:, :, row].unflatten(-1, (6, 4)).sum(-1)
        lightest = torch.where(tiles > 0, tiles, torch.inf).amin(-1)
        assert (mass[:, :, row] - lightest < 0.8).all()


def test_tiles_far_below_the_maximum_give_no_values():
    q, k, v = qkv(4, 8)
    k = torch.cat([k[:, :, :4] * 4, k[:, :, 4:] * 0.01], 2)
    q = q.abs()
    k[:, :, :4] = k[:, :, :4].abs() + 3
    plain = (q @ k.mT).softmax(-1)
    got = attend("softmax pooled_blocks(4, 4, mass=2.0, skip=5.0)", q, k, v)
    assert (plain[..., 4:] > 0).all()
    close(got.weights[..., :4], plain[..., :4])
    close(got.weights[..., 4:], torch.zeros_like(plain[..., 4:]))


def kept_by(line, q, k, v, **operands):
    return (attend(line, q, k, v, **operands).weights > 0).all(2)


def test_short_keys_are_kept():
    q, k, v = qkv(3, 12, key_heads=2)
    norms = k.norm(dim=-1)
    expected = (norms <= norms.sort(-1).values[..., 4:5]).repeat_interleave(2, 1)
    assert torch.equal(kept_by("softmax keep(5)", q, k, v), expected)


def test_kept_keys_sinks_recent_and_later_ones():
    q, k, v = qkv(1, 12, heads=1, key_heads=1)
    line = "softmax keep(2, by=score, score=load(s, k), sinks=1, recent=2, prompt=10)"
    score = torch.tensor([9.0, 1, 8, 3, 7, 2, 0, 4, 9, 9, 0, 0])
    shown = kept_by(line, q, k, v, s=score)[0, 0].nonzero().flatten().tolist()
    assert shown == [0, 2, 4, 8, 9, 10, 11]


def test_keys_along_the_direction_of_queries_are_kept():
    q, k, v = qkv(3, 12, key_heads=2)
    direction = randn(H, D)
    per_query = torch.einsum("bhkd,hd->bhk", k.repeat_interleave(2, 1), direction)
    shared = per_query.unflatten(1, (2, 2)).mean(2).repeat_interleave(2, 1)
    for group, scores in (("none", per_query), ("mean", shared)):
        got = kept_by(f"softmax keep(5, by=filter, filter=f, group={group})", q, k, v, f=direction)
        assert torch.equal(got, scores >= scores.sort(-1, descending=True).values[..., 4:5])


def test_attention_of_the_last_queries_chooses():
    q, k, v = qkv()
    window = 3
    i, j = positions()
    paid = (0.3 * q @ k.mT).masked_fill(j > i, -torch.inf).softmax(-1)[:, :, -window:].sum(2)[..., :-window]
    pooled = F.max_pool1d(paid, 3, stride=1, padding=1)
    # Neighbours share a maximum, so several choices are right: compare the scores that were kept.
    got = kept_by("softmax scale(0.3) keep(4, by=snap, pool=3, pooling=max, recent=3)", q, k, v)
    best = pooled.sort(-1, descending=True).values[..., :4].sum(-1)
    close((pooled * got[..., :9]).sum(-1), best)
    assert (got[..., :9].sum(-1) == 4).all() and got[..., 9:].all()
    step = attend(
        "softmax scale(0.3) offset(12) keep(4, by=snap, observed=o, recent=3, prompt=12)",
        q[:, :, :1],
        k,
        v,
        o=q[:, :, -3:],
    )
    same = attend("softmax scale(0.3) keep(4, by=snap, recent=3)", q, k, v)
    assert torch.equal(step.weights[:, :, 0] > 0, same.weights[:, :, 0] > 0)


def test_expected_attention_is_an_average_over_queries():
    _, k, v = qkv(1, 12)
    mean, root = 0.5 * randn(H, D), 0.3 * randn(H, D, D)
    covariance = root @ root.mT
    drawn = mean[:, None] + randn(H, 200_000, D) @ root.mT
    paid = torch.stack([(0.3 * drawn[h] @ k[0, h].mT).exp().mean(0) for h in range(H)])
    formula = (
        0.3 * torch.einsum("hd,hkd->hk", mean, k[0]) + 0.045 * torch.einsum("hkc,hcd,hkd->hk", k[0], covariance, k[0])
    ).exp()
    torch.testing.assert_close(paid, formula, rtol=0.1, atol=0.02)
    score = formula / formula.sum(-1, keepdim=True) * v[0].norm(dim=-1)
    got = kept_by("softmax scale(0.3) keep(4, by=expected, mean=m, covariance=c)", randn(B, H, 2, D), k, v, m=mean, c=covariance)
    assert torch.equal(got[0], score >= score.sort(-1, descending=True).values[:, 3:4])


def test_expected_attention_is_shared_in_a_group_after_normalising():
    q, k, v = qkv(2, 12, key_heads=2)
    mean = 2 * randn(H, D)
    mean[0] *= 3  # heads of one group that differ in sharpness: only shares may be averaged
    z = torch.einsum("hd,bhkd->bhk", mean, k.repeat_interleave(2, 1))
    paid = z[..., 3:].softmax(-1).unflatten(1, (2, 2)).mean(2) * v.norm(dim=-1)[..., 3:]
    shown = paid >= paid.sort(-1, descending=True).values[..., 2:3]
    expected = torch.cat([torch.ones(B, 2, 3, dtype=torch.bool), shown], -1).repeat_interleave(2, 1)
    assert torch.equal(kept_by("softmax keep(3, by=expected, mean=m, sinks=3)", q, k, v, m=mean), expected)
