"""The reference against formulas written on their own, in float64: masks, heads, score terms, rows that see nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from ir.operands import B, D, H, Q, close, masked, positions, qkv, randn

from attnopt.errors import InputMismatch
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.reference import attend, reference
from attnopt.ir.spec import parse

NEGATIVE = torch.finfo(torch.float64).min


@pytest.mark.parametrize("scale", [1.0, D**-0.5, 0.3])
def test_plain_softmax(scale):
    q, k, v = qkv(5, 9)
    close(reference(f"softmax scale({scale})", q, k, v), F.scaled_dot_product_attention(q, k, v, scale=scale))


def test_causal_is_aligned_at_the_first_query():
    q, k, v = qkv(5, 9)
    close(reference("softmax causal", q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0))


def test_with_a_past_queries_are_the_last_positions():
    q, k, v = qkv()
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    close(reference("softmax offset(size(k) - size(q)) causal", q[:, :, -3:], k, v), whole[:, :, -3:])
    close(reference("softmax offset(7) causal", q[:, :, 7:9], k, v), whole[:, :, 7:9])


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        ("causal & window(4)", lambda i, j: (j <= i) & (i - j < 4)),
        ("window(3) & lookahead(2)", lambda i, j: (i - j < 3) & (j - i < 2)),
        ("causal & (window(3) | global(2))", lambda i, j: (j <= i) & ((i - j < 3) | (j < 2))),
        ("causal | global(4)", lambda i, j: (j <= i) | (j < 4)),
        ("global_query(2) | last(3) | diagonal", lambda i, j: (i < 2) | (j >= Q - 3) | (i == j)),
        ("last_query(2) | chunk(5)", lambda i, j: (i >= Q - 2) | (i // 5 == j // 5)),
        ("near_blocks(3, 1)", lambda i, j: (i // 3 - j // 3).abs() <= 1),
        ("causal & dilated(3)", lambda i, j: (j <= i) & ((i - j) % 3 == 0)),
        ("~causal | diagonal", lambda i, j: (j > i) | (i == j)),
    ],
)
def test_masks(mask, seen):
    q, k, v = qkv()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen(*positions()), scale=1.0)
    close(reference(f"softmax {mask}", q, k, v), expected)


def neighbours(i, length, window, dilation, stride, causal):
    """Keys of query i along one dimension, by the rule of Faster Neighborhood Attention, one group member at a time."""
    group, place = i % dilation, i // dilation
    members = list(range(group, length, dilation))
    if causal:
        lead = min(place // stride * stride + stride - 1, len(members) - 1)
        return {members[m] for m in range(len(members)) if m <= place and 0 <= lead - m < window}
    lead = min(place // stride * stride + stride // 2, len(members) - 1)
    start = min(max(lead - window // 2, 0), len(members) - window)
    return set(members[start : start + window])


@pytest.mark.parametrize(
    ("window", "dilation", "stride"), [(3, 1, 1), (4, 1, 1), (3, 2, 1), (4, 1, 4), (5, 1, 2), (2, 3, 2), (12, 1, 1)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_neighbourhoods(window, dilation, stride, causal):
    q, k, v = qkv()
    name = "causal_neighborhood" if causal else "neighborhood"
    shown = attend(f"softmax {name}({window}, {dilation}, {stride}, {Q}, 1)", q, k, v).weights[0, 0] > 0
    for i in range(Q):
        expected = neighbours(i, Q, window, dilation, stride, causal)
        assert set(shown[i].nonzero().flatten().tolist()) == expected
        assert causal or len(expected) == window


def test_neighbourhoods_of_a_grid_meet():
    q, k, v = qkv()
    shown = attend("softmax neighborhood(3, 1, 1, 3, 4) & neighborhood(2, 1, 1, 4, 1)", q, k, v).weights[0, 0] > 0
    for i in range(Q):
        rows, columns = neighbours(i // 4, 3, 3, 1, 1, False), neighbours(i % 4, 4, 2, 1, 1, False)
        assert set(shown[i].nonzero().flatten().tolist()) == {4 * r + c for r in rows for c in columns}


def test_power_blocks_reach_every_block_in_few_layers():
    mask = parse("softmax causal & (near_blocks(256, 4) | power_blocks(256) | global(256))").mask
    blocks = evaluate(mask, Grid(1, 1, 128 * 256, 128 * 256, q_step=256, k_step=256))[0, 0]
    assert blocks[-1].sum() == 10
    reached, seen = torch.zeros(128, dtype=torch.bool), []
    reached[-1] = True
    for _ in range(6):
        reached = blocks[reached].any(0)
        seen.append(int(reached.sum()))
    assert seen == [10, 35, 75, 110, 126, 128]


def test_masks_from_operands():
    q, k, v = qkv()
    padding = torch.rand(B, Q) < 0.7
    padding[:, 0] = True
    document, prefix = torch.tensor([0, 1]).repeat_interleave(6).expand(B, Q), torch.tensor([3, 5])
    close(
        reference("softmax padding", q, k, v, padding=padding),
        F.scaled_dot_product_attention(q, k, v, attn_mask=padding[:, None, None], scale=1.0),
    )
    same = (document[:, :, None] == document[:, None])[:, None]
    close(
        reference("softmax document", q, k, v, document=document),
        F.scaled_dot_product_attention(q, k, v, attn_mask=same, scale=1.0),
    )
    i, j = positions()
    shown = ((j <= i)[None] | (j[None] < prefix[:, None, None]))[:, None]
    close(
        reference("softmax causal | prefix", q, k, v, prefix=prefix),
        F.scaled_dot_product_attention(q, k, v, attn_mask=shown, scale=1.0),
    )


@pytest.mark.parametrize(("key_heads", "value_heads"), [(2, 2), (1, 1), (4, 2), (1, 4)])
def test_grouped_heads(key_heads, value_heads):
    q, k, v = qkv(key_heads=key_heads, value_heads=value_heads)
    each = [
        F.scaled_dot_product_attention(q[:, h], k[:, h * key_heads // H], v[:, h * value_heads // H], scale=1.0) for h in range(H)
    ]
    close(reference(f"softmax heads({H}, {key_heads}, {value_heads})", q, k, v), torch.stack(each, 1))


def test_a_table_may_say_which_head_is_read():
    q, k, v = qkv(key_heads=2)
    table = torch.tensor([0, 0, 0, 1])
    each = [F.scaled_dot_product_attention(q[:, h], k[:, t], v[:, t], scale=1.0) for h, t in enumerate(table)]
    close(reference("softmax heads(4, 2, map=t)", q, k, v, t=table), torch.stack(each, 1))
    with pytest.raises(InputMismatch, match="a table of 4 numbers below 2"):
        reference("softmax heads(4, 2, map=t)", q, k, v, t=torch.tensor([0, 1, 2, 3]))


def test_additive_bias_and_large_negative_terms_are_no_mask():
    q, k, v = qkv()
    bias = randn(1, H, Q, Q)
    bias[..., 3] = -10000.0
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.5)
    close(reference("softmax scale(0.5) add(load(bias, 0, h, q, k))", q, k, v, bias=bias), expected)
    weights = attend("softmax add(-10000.0)", q, k, v).weights
    close(weights, attend("softmax", q, k, v).weights, 1e-10)


def test_score_terms_act_in_order():
    q, k, v = qkv()
    s = q @ k.mT
    bias = randn(Q, Q)
    capped = 5 * torch.tanh((s * 0.5) / 5) + bias
    close(reference("softmax scale(0.5) softcap(5.0) add(load(c, q, k))", q, k, v, c=bias), capped.softmax(-1) @ v)
    late = (5 * torch.tanh(s / 5) + bias) * 0.5
    close(reference("softmax softcap(5.0) add(load(c, q, k)) scale(0.5)", q, k, v, c=bias), late.softmax(-1) @ v)
    close(reference("softmax mod(relu) mod(square)", q, k, v), s.relu().square().softmax(-1) @ v)
    temperature = randn(B, H, Q)
    expected = (s * temperature[..., None]).softmax(-1) @ v
    close(reference("softmax scale(load(t, b, h, row))", q, k, v, t=temperature), expected)


def test_alibi():
    q, k, v = qkv()
    slopes = torch.tensor([2.0 ** -(8 * (h + 1) / H) for h in range(H)], dtype=torch.float64)
    i, j = positions()
    bias = -slopes[:, None, None] * (i - j)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(j > i, -torch.inf), scale=1.0)
    close(reference("softmax add(alibi) causal", q, k, v, slopes=slopes), expected)


def test_relative_table():
    q, k, v = qkv()
    table = randn(9, H)
    i, j = positions()
    bias = table[(i - j).clamp(-4, 4) + 4].permute(2, 0, 1)
    line = "softmax add(load(table, min(max(q - k, -4), 4) + 4, h))"
    close(reference(line, q, k, v, table=table), (q @ k.mT + bias).softmax(-1) @ v)


def test_empty_rows():
    q, k, v = qkv()
    i, _ = positions()
    seen = (i >= 2).expand(Q, Q)
    mean, zero = (reference(f"softmax q >= 2 empty({how})", q, k, v) for how in ("mean", "zero"))
    close(mean[:, :, :2], v.mean(2, keepdim=True).expand(-1, -1, 2, -1))
    close(zero[:, :, :2], torch.zeros_like(zero[:, :, :2]))
    close(mean[:, :, 2:], zero[:, :, 2:])
    filled = (q @ k.mT).masked_fill(~seen, NEGATIVE).softmax(-1) @ v
    close(reference("softmax q >= 2", q, k, v), filled)


def test_sinks():
    q, k, v = qkv()
    i, j = positions()
    s = (q @ k.mT).masked_fill(j > i, -torch.inf)
    sinks = randn(H)
    extra = torch.cat([s, sinks[:, None, None].expand(B, H, Q, 1)], -1).softmax(-1)[..., :-1]
    close(reference("softmax sink(load(sinks, h)) causal", q, k, v, sinks=sinks), extra @ v)
    one = s.exp() / (1 + s.exp().sum(-1, keepdim=True))
    close(reference("softmax sink(0.0) causal", q, k, v), one @ v)
    blind = reference("softmax sink(0.0) q > 3", q, k, v)
    close(blind[:, :, :4], torch.zeros_like(blind[:, :, :4]))


def test_log_sum_exp():
    q, k, v = qkv()
    i, j = positions()
    s = 0.5 * (q @ k.mT)
    close(attend("softmax scale(0.5) causal", q, k, v).lse, s.masked_fill(j > i, -torch.inf).exp().sum(-1).log())
    close(attend("softmax scale(0.5) sink(1.0)", q, k, v).lse, (s.exp().sum(-1) + math.e).log())


def test_two_halves_merge_by_their_log_sum_exp():
    q, k, v = qkv()
    near, far = (attend(f"softmax {mask}", q, k, v) for mask in ("k < 5", "k >= 5"))
    share = torch.sigmoid(far.lse - near.lse)[..., None]
    close((1 - share) * near.output + share * far.output, reference("softmax", q, k, v))


def test_delta_correction():
    q, k, v = qkv(20)
    i, j = positions(20, 20)
    dense, sparse = masked(q, k, v, j <= i), masked(q, k, v, (j <= i) & (i - j < 3))
    expected = sparse.clone()
    for row in range(20):
        first = row // 4 * 4
        expected[:, :, row] += dense[:, :, first] - sparse[:, :, first]
    expected[:, :, 20 - 4 :] = dense[:, :, 20 - 4 :]  # the last n mod 4 + max(2, 4) rows
    close(reference("softmax causal & window(3) delta(4, dense=causal, tail=2)", q, k, v), expected)
    close(reference("softmax causal & window(3) delta(1, dense=causal, tail=0)", q, k, v), dense)
    chosen = reference("softmax causal top_keys(2) delta(4, tail=0)", q, k, v)
    close(chosen[:, :, ::4], dense[:, :, ::4])


@pytest.mark.parametrize(
    ("line", "shapes", "says"),
    [
        ("softmax", ((1, 3, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "no multiple"),
        ("softmax", ((1, 2, 4, 8), (1, 2, 5, 8), (1, 2, 4, 8)), "differ in length"),
        ("softmax", ((1, 2, 4, 8), (1, 2, 4, 6), (1, 2, 4, 8)), "differ in width"),
        ("softmax", ((2, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "differ in batch"),
        ("softmax", ((2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "q has 3 dimensions"),
        ("softmax heads(4)", ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "the spec says heads"),
        ("softmax width(4)", ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "the spec says width"),
        ("softmax shared(kv)", ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "v is not the first channels of k"),
        ("softmax shared(qk)", ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "q and k differ"),
        ("softmax sink(load(x, k))", ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "varies along k"),
        ("softmax conv(kernel)", ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "reads 'kernel', which was not given"),
        (
            "softmax add(load(bias, q, k))",
            ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)),
            "loads 'bias', which was not given",
        ),
        ("softmax keep(2, by=filter)", ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "needs the option filter="),
        (
            "recurrent(value_decay=f) softcap(1.0)",
            ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)),
            "value_decay leaves no weights",
        ),
    ],
)
def test_mismatches_are_named(line, shapes, says):
    operands = {"f": torch.ones(1, 2, 4, 8), "x": torch.zeros(4)}
    with pytest.raises(InputMismatch, match=says):
        reference(line, *(torch.randn(shape) for shape in shapes), **operands)


def test_shared_tensors_are_accepted():
    q, k, _ = qkv(key_heads=1)
    close(reference("softmax shared(kv) width(8, 6)", q, k, k[..., :6]), reference("softmax", q, k, k[..., :6]))
    close(reference("softmax shared(qkv)", q, q, q), reference("softmax", q, q, q))


def test_the_reference_runs_in_the_dtype_of_its_inputs():
    q, k, v = (x.float() for x in qkv())
    line = "softmax scale(0.125) rotary(8) softcap(5.0) add(alibi) causal & window(4)"
    single = reference(line, q, k, v, slopes=torch.rand(H))
    assert single.dtype == torch.float32
