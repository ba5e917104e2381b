"""Keys that are codes still look like the tensor that they stand for, and are that tensor for everything but a kernel of ours."""

from __future__ import annotations

import copy

import pytest
import torch

from attnopt.hosts.eviction.coded import CodedLayer
from attnopt.hosts.eviction.stored import Stored, storage
from attnopt.hosts.eviction.unread import Unread


@pytest.fixture
def held():
    return Stored(storage("cache(k=int4, v=int4)"), "k").grown(torch.randn(2, 3, 9, 16))


def test_its_shape_reads_nothing(held):
    found = Unread(held, 16)
    assert (found.shape, found.dtype, found.device, found.ndim, found.requires_grad) == (
        (2, 3, 9, 16),
        torch.float32,
        torch.device("cpu"),
        4,
        False,
    )
    assert found.found is None


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x,
        lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, 6, 9, 16),
        lambda x: torch.cat([x, x], 2),
        lambda x: torch.nn.functional.scaled_dot_product_attention(torch.ones(2, 3, 1, 16), key=x, value=x),
        lambda x: torch.ops.aten.mul.Tensor(x, 2.0),
        lambda x: torch.ones(2, 3, 1, 16) @ x.mT,
        lambda x: x.to(torch.float64),
        copy.deepcopy,
    ],
)  # fmt: skip
def test_what_is_done_with_it_is_done_with_its_numbers(held, use):
    found = use(Unread(held, 16))
    assert torch.equal(found, use(held.read())) and found.dtype == use(held.read()).dtype


def test_a_cut_reads_what_is_left(held):
    found = Unread(held, 16)
    assert torch.equal(found.cut(lambda x: x[:, :, 2:5]), held.read()[:, :, 2:5]) and found.found is None


def test_a_new_token_alone_gets_its_cache_unread():
    """Prompts, several tokens and what asks for gradients get numbers, and so does all where nobody said that codes are read."""
    x, layer = torch.randn(1, 2, 5, 16), CodedLayer(storage("int8"))
    layer.update(x, x)
    assert type(layer.update(x[:, :, :1], x[:, :, :1])[0]) is torch.Tensor
    layer.reset()
    layer.hands_codes = True
    assert type(layer.update(x, x)[0]) is torch.Tensor
    assert [type(y) for y in layer.update(x[:, :, :1], x[:, :, :1])] == [Unread, Unread]
    assert type(layer.update(x[:, :, :2], x[:, :, :2])[1]) is torch.Tensor
    k, v = layer.update(x[:, :, :1], x[:, :, :1])
    assert torch.equal(k, layer.keys) and torch.equal(v, layer.values) and k.shape == (1, 2, 9, 16)
    asks = x[:, :, :1].clone().requires_grad_()
    assert type(layer.update(asks, asks)[0]) is torch.Tensor
