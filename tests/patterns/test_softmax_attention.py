"""Many spellings, one spec; near misses with the right reason."""

from __future__ import annotations

import pytest
import torch
from spelling import B, L, Recorder

from attnopt.ir.dims import Symbol, symbol
from attnopt.patterns import recognise

H, D = 4, 8
BH = Symbol(H, ("batch",))


def heads(r: Recorder, x, count: int = H, width: int = D):
    return r.permute(r.reshape(r.linear(x, count * width), B, L, count, width), 0, 2, 1, 3)


def finish(r: Recorder, out):
    r.output(r.linear(r.reshape(r.permute(out, 0, 2, 1, 3), B, L, H * D), H * D))
    return recognise(r.graph)


def one_site(found):
    assert not found.refusals, found.refusals
    (site,) = found.sites
    return site


def test_plain_four_dimensional():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    q, k, v = heads(r, x), heads(r, x), heads(r, x)
    p = r.softmax(r.binary("mul", r.matmul(q, r.permute(k, 0, 1, 3, 2)), 0.25))
    site = one_site(finish(r, r.matmul(p, v)))
    assert str(site.spec) == "softmax heads(4) width(8) scale(0.25)"
    # The operands are read where the projections wrote them, the output where the next projection reads it.
    assert [o.value.producer.op for o in (site.q, site.k, site.v)] == ["linear"] * 3
    assert site.output.value.users[0].op == "linear"


@pytest.mark.parametrize("where", ["score", "query", "key", "both"])
def test_scale_in_any_place(where):
    r = Recorder()
    x = r.input("x", B, L, H * D)
    q, k, v = heads(r, x), heads(r, x), heads(r, x)
    if where in ("query", "both"):
        q = r.binary("mul", q, 0.5 if where == "both" else 0.25)
    if where in ("key", "both"):
        k = r.binary("div", k, 2.0 if where == "both" else 4.0)
    s = r.matmul(q, r.permute(k, 0, 1, 3, 2))
    s = r.binary("div", s, 4.0) if where == "score" else s
    site = one_site(finish(r, r.matmul(r.softmax(s), v)))
    assert str(site.spec) == "softmax heads(4) width(8) scale(0.25)"


def test_folded_batch_and_heads():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    mask = r.input("mask", B, 1, L, L)
    q, k, v = (r.reshape(heads(r, x), BH, L, D) for _ in range(3))
    s = r.reshape(r.matmul(q, r.permute(k, 0, 2, 1)), B, H, L, L)
    s = r.reshape(r.binary("add", s, mask), BH, L, L)
    out = r.reshape(r.matmul(r.softmax(s), v), B, H, L, D)
    site = one_site(finish(r, out))
    assert str(site.spec) == "softmax heads(4) width(8) add(load(bias0, b, 0, row, k))"
    assert [o.value.producer.op for o in (site.q, site.k, site.v)] == ["linear"] * 3


@pytest.mark.parametrize("spelling", ["expand", "five_dimensional"])
def test_grouped_heads(spelling):
    r = Recorder()
    x = r.input("x", B, L, H * D)
    q, k, v = heads(r, x), heads(r, x, 2), heads(r, x, 2)
    if spelling == "expand":
        k, v = (r.reshape(r.expand(r.reshape(t, B, 2, 1, L, D), B, 2, 2, L, D), B, H, L, D) for t in (k, v))
        out = r.matmul(r.softmax(r.matmul(q, r.permute(k, 0, 1, 3, 2))), v)
    else:
        q = r.reshape(q, B, 2, 2, L, D)
        k, v = (r.reshape(t, B, 2, 1, L, D) for t in (k, v))
        out = r.matmul(r.softmax(r.matmul(q, r.permute(k, 0, 1, 2, 4, 3))), v)
        out = r.reshape(out, B, H, L, D)
    site = one_site(finish(r, out))
    assert str(site.spec) == "softmax heads(4, 2) width(8)"
    assert (site.size("g"), site.size("r")) == (2, 2)


def test_tiled_heads_are_not_grouped():
    """Heads repeated as h0 h1 h0 h1 are another mapping: the keys are read after their repetition."""
    r = Recorder()
    x = r.input("x", B, L, H * D)
    q, k, v = heads(r, x), heads(r, x, 2), heads(r, x, 2)
    k, v = (r.reshape(r.expand(r.reshape(t, B, 1, 2, L, D), B, 2, 2, L, D), B, H, L, D) for t in (k, v))
    site = one_site(finish(r, r.matmul(r.softmax(r.matmul(q, r.permute(k, 0, 1, 3, 2))), v)))
    assert str(site.spec) == "softmax heads(4) width(8)"


def test_softcap_masks_and_casts():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    seen = r.input("seen", B, 1, 1, L, dtype="bool")
    q, k, v = heads(r, x), heads(r, x), heads(r, x)
    s = r.binary("mul", r.matmul(q, r.permute(k, 0, 1, 3, 2)), 0.25)
    s = r.binary("mul", r.unary("tanh", r.binary("div", s, 30.0)), 30.0)
    s = r.where(seen, s, float("-inf"))
    p = r.unary("cast", r.softmax(r.unary("cast", s, "float64")), "float32")
    site = one_site(finish(r, r.matmul(p, v)))
    assert str(site.spec) == "softmax heads(4) width(8) scale(0.25) softcap(30.0) padding empty(zero)"


def test_masked_fill_is_negated():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    hidden = r.input("hidden", B, 1, 1, L, dtype="bool")
    q, k, v = heads(r, x), heads(r, x), heads(r, x)
    s = r.where(hidden, -3.0e38, r.matmul(q, r.permute(k, 0, 1, 3, 2)))
    site = one_site(finish(r, r.matmul(r.softmax(s), v)))
    assert str(site.spec) == "softmax heads(4) width(8) ~load(mask0, b, k)"


def test_softmax_by_hand():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    q, k, v = heads(r, x), heads(r, x), heads(r, x)
    s = r.matmul(q, r.permute(k, 0, 1, 3, 2))
    e = r.unary("exp", r.binary("sub", s, r.reduce("reduce_max", s, -1)))
    p = r.binary("div", e, r.reduce("reduce_sum", e, -1))
    assert str(one_site(finish(r, r.matmul(p, v))).spec) == "softmax heads(4) width(8)"


def refusal(r: Recorder):
    found = recognise(r.graph)
    assert not found.sites
    (refused,) = found.refusals
    return refused


def test_router_is_no_attention():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    r.output(r.softmax(r.linear(x, 8)))
    assert "no product with values" in refusal(r).reason


def test_softmax_over_the_wrong_axis():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    q, k, v = heads(r, x), heads(r, x), heads(r, x)
    p = r.softmax(r.matmul(q, r.permute(k, 0, 1, 3, 2)), axis=-2)
    r.output(r.matmul(p, v))
    assert refusal(r).reason == "the softmax runs over q, not over the keys"


def test_mask_after_the_softmax():
    r = Recorder()
    x, mask = r.input("x", B, L, H * D), r.input("mask", B, 1, L, L)
    q, k, v = heads(r, x), heads(r, x), heads(r, x)
    p = r.binary("add", r.softmax(r.matmul(q, r.permute(k, 0, 1, 3, 2))), mask)
    r.output(r.matmul(p, v))
    refused = refusal(r)
    assert refused.reason.startswith("the weights enter 'add'")
    assert refused.node.startswith("add")


def test_weights_read_elsewhere_are_noted():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    q, k, v = heads(r, x), heads(r, x), heads(r, x)
    p = r.softmax(r.matmul(q, r.permute(k, 0, 1, 3, 2)))
    r.output(p)
    assert one_site(finish(r, r.matmul(p, v))).weights_used is not None


def test_scores_from_one_activation():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    scores = r.linear(x, 16)
    r.output(r.matmul(r.softmax(scores), r.linear(r.input("y", B, 16, H * D), 8)))
    assert "linear" in refusal(r).reason


def scored(r: Recorder):
    x = r.input("x", B, L, H * D)
    q, k, v = heads(r, x), heads(r, x), heads(r, x)
    return r.matmul(q, r.permute(k, 0, 1, 3, 2)), v


def test_weights_hidden_again_after_the_softmax_make_empty_rows_zero():
    r = Recorder()
    s, v = scored(r)
    seen = r.input("seen", B, 1, 1, L, dtype="bool")
    p = r.where(seen, r.softmax(r.where(seen, s, -3.0e38)), 0.0)
    assert str(one_site(finish(r, r.matmul(p, v))).spec) == "softmax heads(4) width(8) padding empty(zero)"


def test_weights_hidden_by_a_condition_that_always_holds_stay_as_they_are():
    r = Recorder()
    s, v = scored(r)
    bias = r.input("bias", B, H, L, L)
    seen = r.constant(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    p = r.where(seen, r.softmax(r.where(seen, r.binary("add", s, bias), -3.0e38)), 0.0)
    site = one_site(finish(r, r.matmul(p, v)))
    assert str(site.spec) == "softmax heads(4) width(8) add(load(bias0, b, h, row, k))"
    assert site.tensor_form is not None  # a kernel may read the bias as the graph holds it


def test_factors_on_the_weights():
    r = Recorder()
    s, v = scored(r)
    p = r.binary("mul", r.softmax(s), r.input("gate", B, H, L, 1))
    assert str(one_site(finish(r, r.matmul(p, v))).spec) == ("softmax heads(4) width(8) value_scale(load(factor0, b, h, row, 0))")
    r = Recorder()
    s, v = scored(r)
    hidden = r.input("hidden", B, 1, L, 1, dtype="bool")
    p = r.where(hidden, 0.0, r.softmax(s))
    spec = str(one_site(finish(r, r.matmul(p, v))).spec)
    assert spec == "softmax heads(4) width(8) value_scale(where(load(factor0, b, 0, row, 0), 0.0, 1.0))"


@pytest.mark.parametrize("last", [True, False])
def test_a_sink_beside_the_scores(last):
    r = Recorder()
    s, v = scored(r)
    sink = r.expand(r.reshape(r.constant(torch.randn(H)), 1, H, 1, 1), B, H, L, 1)
    more = symbol("length + 1")
    joined = r.node("concat", *((s, sink) if last else (sink, s)), shape=(B, H, L, more), axis=3)
    p = r.softmax(joined)
    start, stop = (0, -1) if last else (1, None)
    kept = r.node("slice", p, shape=(B, H, L, L), axis=3, start=start, stop=stop, step=1)
    assert str(one_site(finish(r, r.matmul(kept, v))).spec) == "softmax heads(4) width(8) sink(load(sink0, h))"


def test_a_dropped_column_that_is_no_sink():
    r = Recorder()
    s, v = scored(r)
    wide = r.input("wide", B, H, L, symbol("length + 1"))
    p = r.softmax(r.binary("add", wide, wide))
    kept = r.node("slice", p, shape=(B, H, L, L), axis=3, start=0, stop=-1, step=1)
    r.output(r.matmul(kept, v))
    refused = refusal(r)
    assert "no sink" in refused.reason or "joined with a sink" in refused.reason
    assert (refused.reached, s.producer.op) == ("softmax over the keys", "matmul")


def test_learned_queries_are_queries():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    latents = r.linear(r.expand(r.constant(torch.randn(1, 5, H * D)), B, 5, H * D), H * D)
    q = r.permute(r.reshape(latents, B, 5, H, D), 0, 2, 1, 3)
    k, v = heads(r, x), heads(r, x)
    out = r.matmul(r.softmax(r.matmul(q, r.permute(k, 0, 1, 3, 2))), v)
    r.output(out)
    site = one_site(recognise(r.graph))
    assert (str(site.spec), site.size("q")) == ("softmax heads(4) width(8)", 5)


def test_a_near_miss_says_how_far_it_came_and_what_would_match():
    r = Recorder()
    s, v = scored(r)
    p = r.softmax(r.unary("exp", s))
    r.output(r.matmul(p, v))
    refused = refusal(r)
    assert refused.reached == "softmax over the keys"
    assert "'exp' stands between" in refused.reason
    assert "scale, soft cap, biases, masks" in refused.remedy
