"""From the output down: parallel branches, norms after, layer scales; and what breaks the way."""

from __future__ import annotations

import pytest
import torch
from spelling import B, L, Recorder

from attnopt.patterns import recognise
from attnopt.patterns.block import find_block

H, D, C = 4, 8, 32


class Layer:
    """Attention over norm(x) up to the merged heads; tests write what follows."""

    def __init__(self, normed: bool = True) -> None:
        self.r = r = Recorder()
        self.x = r.input("x", B, L, C)
        self.hidden = self.norm(self.x) if normed else self.x
        q, k, v = (r.permute(r.reshape(r.linear(self.hidden, C), B, L, H, D), 0, 2, 1, 3) for _ in range(3))
        out = r.matmul(r.softmax(r.matmul(q, r.permute(k, 0, 1, 3, 2))), v)
        self.heads = r.reshape(r.permute(out, 0, 2, 1, 3), B, L, C)

    def norm(self, x):
        weight = self.r.constant(torch.ones(C))
        return self.r.node("rms_norm", x, weight, shape=x.shape, eps=1e-6)

    def add(self, a, b):
        return self.r.binary("add", a, b)

    def block(self, value):
        self.r.output(value)
        (site,) = recognise(self.r.graph).sites
        return find_block(self.r.graph, site)


def test_pre_norm():
    layer = Layer()
    block = layer.block(layer.norm(layer.add(layer.x, layer.r.linear(layer.heads, C))))
    assert block.residual.value is layer.x and block.norm.input is layer.x
    assert (block.residual.parallel, block.residual.o_norm, block.residual.post_norm) == (False, None, None)
    assert not block.missing


def test_post_norm():
    layer = Layer(normed=False)
    block = layer.block(layer.norm(layer.add(layer.r.linear(layer.heads, C), layer.x)))
    assert block.norm is None and block.residual.post_norm.kind == "rms"


def test_the_norm_of_the_next_branch_is_not_the_end_of_this_one():
    layer = Layer(normed=False)
    total = layer.add(layer.r.linear(layer.heads, C), layer.x)
    block = layer.block(layer.add(layer.r.linear(layer.norm(total), C), total))
    assert block.norm is None and block.residual.post_norm is None


def test_a_residual_of_normed_values_leaves_the_norm_to_the_block_before():
    layer = Layer()
    block = layer.block(layer.norm(layer.add(layer.r.linear(layer.heads, C), layer.hidden)))
    assert block.norm is None and block.residual.value is layer.hidden


@pytest.mark.parametrize("order", ["branches_first", "attention_first"])
def test_parallel_branches(order):
    layer = Layer()
    branch = layer.r.linear(layer.r.unary("gelu", layer.r.linear(layer.hidden, 64)), C)
    out = layer.r.linear(layer.heads, C)
    first, second = (branch, layer.x) if order == "branches_first" else (layer.x, branch)
    block = layer.block(layer.add(layer.add(out, first), second))
    assert block.residual.parallel and block.residual.value is layer.x


def test_layer_scale_and_norm_of_the_output():
    layer = Layer()
    out = layer.r.binary("mul", layer.r.linear(layer.heads, C), layer.r.constant(torch.randn(C)))
    block = layer.block(layer.add(layer.norm(out), layer.x))
    assert block.residual.scaled and block.residual.o_norm.kind == "rms"


def test_a_gate_before_the_output_projection():
    layer = Layer()
    gate = layer.r.unary("sigmoid", layer.r.linear(layer.hidden, C))
    block = layer.block(layer.add(layer.r.linear(layer.r.binary("mul", layer.heads, gate), C), layer.x))
    assert block.o is None and block.residual is None
    (refusal,) = block.missing
    assert refusal.reason == "output projection not found: 'mul' stands between the attention and a linear layer"
    assert refusal.at.op == "mul"


def test_no_residual():
    layer = Layer()
    block = layer.block(layer.r.unary("gelu", layer.r.linear(layer.heads, C)))
    assert block.o is not None and block.norm is not None
    (refusal,) = block.missing
    assert refusal.reason.startswith("residual not found: the input of the block is not added")


def test_an_output_that_several_nodes_read():
    layer = Layer()
    layer.r.output(layer.r.linear(layer.heads, 8))
    block = layer.block(layer.add(layer.r.linear(layer.heads, C), layer.x))
    assert block.missing[0].reason == "output projection not found: several nodes read the output"
