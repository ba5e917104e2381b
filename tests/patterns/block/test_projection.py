"""Where a projection is not a constant layer of the operand's channels, the block says so, and keeps the other parts."""

from __future__ import annotations

import pytest
import torch
from spelling import B, L, Recorder

from attnopt.ir.block import Scale
from attnopt.patterns import recognise
from attnopt.patterns.block import find_block

H, D = 4, 8


def heads(r: Recorder, x):
    return r.permute(r.reshape(x, B, L, H, D), 0, 2, 1, 3)


def block_of(r: Recorder, x, project):
    """The block of a layer whose queries are made by `project`."""
    q, k, v = heads(r, project(x)), heads(r, r.linear(x, H * D)), heads(r, r.linear(x, H * D))
    out = r.matmul(r.softmax(r.matmul(q, r.permute(k, 0, 1, 3, 2))), v)
    r.output(r.binary("add", r.linear(r.reshape(r.permute(out, 0, 2, 1, 3), B, L, H * D), H * D), x))
    (site,) = recognise(r.graph).sites
    return find_block(r.graph, site)


def computed_weight(r: Recorder):
    halves = [r.constant(torch.randn(H * D // 2, H * D)) for _ in range(2)]
    return r.node("concat", *halves, shape=(H * D, H * D), axis=0)


def dequantized(r: Recorder):
    stored = r.constant(torch.zeros(H * D, H * D, dtype=torch.int8))
    return r.node("opaque", stored, shape=(H * D, H * D), operator="DequantizeLinear")


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (computed_weight, "its weight is made by 'concat', not constant"),
        (dequantized, "its weight is made by 'DequantizeLinear', not constant"),
        (lambda r: r.input("weight", H * D, H * D), "its weight is an input of the model, not constant"),
    ],
)
def test_weights_that_are_not_constant(weight, reason):
    r = Recorder()
    x = r.input("x", B, L, H * D)
    block = block_of(r, x, lambda x: r.node("linear", x, weight(r), shape=(B, L, H * D)))
    assert block.q is None and block.k is not None and block.v is not None and block.o is not None
    assert str(block.missing[0]).startswith(f"projection of queries not found: {reason}")


def test_an_unknown_operation_between():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    block = block_of(r, x, lambda x: r.node("opaque", r.linear(x, H * D), shape=(B, L, H * D), operator="aten.fft_fft"))
    refusal = block.missing[0]
    assert refusal.reason == "projection of queries not found: 'aten.fft_fft' stands between them and a linear layer"
    assert refusal.at.op == "opaque"


def test_queries_without_a_projection():
    r = Recorder()
    x, given = r.input("x", B, L, H * D), r.input("given", B, L, H * D)
    block = block_of(r, x, lambda x: given)
    assert block.missing[0].reason == "projection of queries not found: they are an input of the model, 'given'"


def test_a_factor_before_a_norm_is_a_step():
    r = Recorder()
    x = r.input("x", B, L, H * D)

    def project(x):
        halved = r.reshape(r.binary("div", r.linear(x, H * D), 2.0), B, L, H, D)
        return r.reshape(r.node("rms_norm", halved, r.constant(torch.ones(D)), shape=(B, L, H, D), eps=1e-6), B, L, H * D)

    block = block_of(r, x, project)
    assert [type(step).__name__ for step in block.streams["q"]] == ["Projection", "Scale", "HeadNorm"]
    assert (block.part("q", Scale).factor, block.q_norm.axis, block.q_norm.norm.eps) == (0.5, "head", 1e-6)


def test_a_shared_weight_names_its_other_readers():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    weight = r.weight(H * D, H * D)
    r.output(r.node("linear", x, weight, shape=(B, L, H * D)))
    other = r.graph.nodes[-1]
    block = block_of(r, x, lambda x: r.node("linear", x, weight, shape=(B, L, H * D)))
    assert block.q.shared == (other,)
    assert block.k.shared == ()
    assert f"q 32x32 (weight also read by {other.name})" in str(block)


def test_a_product_with_a_transposed_weight_and_a_bias_behind_a_reshape():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    weight, bias = torch.randn(H * D, H * D), torch.randn(H * D)

    def project(x):
        flat = r.reshape(r.matmul(x, r.permute(r.constant(weight), 1, 0)), B, L, H * D)
        return r.binary("add", flat, r.constant(bias))

    block = block_of(r, x, project)
    assert not block.missing
    assert torch.equal(block.q.matrix(), weight)
    assert torch.equal(block.q.bias_rows().flatten(), bias)
    assert block.q.range == (0, H * D) and not block.q.packed


def test_channels_cut_and_permuted_from_a_packed_layer():
    r = Recorder()
    x = r.input("x", B, L, H * D)
    weight = torch.randn(3 * H * D, H * D)

    def project(x):
        packed = r.node("linear", x, r.constant(weight), shape=(B, L, 3 * H * D))
        apart = r.permute(r.reshape(packed, B, L, H, D, 3), 0, 1, 4, 2, 3)
        second = r.node("slice", apart, shape=(B, L, 1, H, D), axis=2, start=1, stop=2, step=1)
        return r.reshape(second, B, L, H * D)

    block = block_of(r, x, project)
    assert block.q.packed and block.q.range is None
    assert torch.equal(block.q.rows(), weight.view(H, D, 3, H * D)[:, :, 1])
