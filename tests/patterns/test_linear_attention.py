"""Linear attention is named and left alone; attention, and what only looks like a chain of products, is not called so."""

from __future__ import annotations

import pytest
from spelling import B, L, Recorder

from attnopt.ir.graph import Source
from attnopt.patterns import recognise

H, D = 4, 8


def heads(r: Recorder, x):
    return r.permute(r.reshape(r.linear(x, H * D), B, L, H, D), 0, 2, 1, 3)


def transposed(r: Recorder, x):
    return r.permute(x, 0, 1, 3, 2)


def state(r: Recorder, q, k, v):
    q, k = r.unary("relu", q), r.unary("relu", k)
    return r.matmul(q, r.binary("mul", r.matmul(transposed(r, k), v), 0.5))


def scores(r: Recorder, q, k, v):
    return r.matmul(r.binary("mul", r.matmul(q, transposed(r, k)), r.input("decay", H, L, L)), v)


def chunk_of_scores(r: Recorder, q, k, v):
    every = r.binary("mul", r.matmul(r.reshape(q, B, H, 1, L, D), r.permute(r.reshape(k, B, H, 1, L, D), 0, 1, 2, 4, 3)), 0.5)
    chunk = r.node("slice", every, shape=(B, H, 1, L, L), axis=2, start=0, stop=1, step=1)
    return r.matmul(r.reshape(chunk, B, H, L, L), v)


def elu(r: Recorder, x):
    return r.binary("add", r.node("opaque", x, shape=x.shape, operator="aten.elu.default"), 1.0)


CASES = {
    "state": (state, "phi(q) (phi(k)' v) without a softmax, phi = relu"),
    "scores": (scores, "(phi(q) phi(k)') v without a softmax"),
    "chunk": (chunk_of_scores, "(phi(q) phi(k)') v without a softmax"),
    "elu": (
        lambda r, q, k, v: r.matmul(elu(r, q), r.matmul(transposed(r, elu(r, k)), v)),
        "phi(q) (phi(k)' v) without a softmax, phi = elu + 1"),
    "softmaxes of channels": (
        lambda r, q, k, v: r.matmul(r.softmax(q), r.matmul(transposed(r, r.softmax(k, -2)), v)),
        "phi(q) (phi(k)' v) without a softmax, phi = softmax",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_named(name):
    build, said = CASES[name]
    r = Recorder()
    x = r.input("x", B, L, H * D)
    out = build(r, heads(r, x), heads(r, x), heads(r, x))
    r.output(out)
    found = recognise(r.graph)
    assert not found.sites
    (refusal,) = [f for f in found.refusals if "linear attention" in f.reason]
    assert refusal.reason == f"linear attention, left alone: {said}"
    assert refusal.at is out.producer
    assert refusal.remedy


def test_softmax_attention_is_none():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    q, k, v = heads(r, x), heads(r, x), heads(r, x)
    r.output(r.matmul(r.softmax(r.matmul(q, transposed(r, k))), v))
    found = recognise(r.graph)
    assert len(found.sites) == 1
    assert not found.refusals


def test_products_with_weights_are_projections():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    r.output(r.matmul(r.matmul(heads(r, x), r.weight(D, D)), transposed(r, heads(r, x))))
    assert not recognise(r.graph).refusals


def test_a_gate_between_two_products_is_none():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    gate = r.unary("tanh", r.unary("sigmoid", r.matmul(heads(r, x), transposed(r, heads(r, x)))))
    r.output(r.matmul(gate, heads(r, x)))
    assert not recognise(r.graph).refusals


def test_weights_multiplied_twice_belong_to_the_softmax():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    q, k, v = heads(r, x), heads(r, x), heads(r, x)
    p = r.softmax(r.matmul(q, transposed(r, k)))
    r.output(r.matmul(p, r.matmul(p, v)))
    assert not [f for f in recognise(r.graph).refusals if "linear attention" in f.reason]


def test_a_module_is_told_once():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    for _ in range(3):
        r.output(scores(r, heads(r, x), heads(r, x), heads(r, x)))
    for node in r.graph.nodes:
        node.source = Source("layers.0.mixer")
    assert len(recognise(r.graph).refusals) == 1
