"""Layers whose product another one makes: the same numbers in any order of calls, in threads, in copies and under torch.compile."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from attnopt.hosts.module.packed import PackedLinear, linear, pack

SIZES = {"q": 12, "k": 6, "v": 6}


class Attention(nn.Module):
    """Three layers of one input, called in an order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, size) for size in SIZES.values())
        self.order = order

    def forward(self, x):
        made = {name: getattr(self, name)(x) for name in self.order}
        return torch.cat([made[name] for name in "qkv"], -1)


def pair(order: str = "qkv") -> tuple[Attention, Attention]:
    """As it is, and packed."""
    torch.manual_seed(0)
    one = Attention(order).requires_grad_(False)
    other = copy.deepcopy(one)
    layers = [other.q, other.k, other.v]
    whole = linear(torch.cat([x.weight for x in layers]), torch.cat([x.bias for x in layers]))
    pack(other, "q", 12, {"k": 6, "v": 6}, whole)
    return one, other


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("order", ["qkv", "kqv", "vqk", "vkq", "qvk"])
def test_the_same_in_any_order(order):
    one, other = pair(order)
    assert torch.allclose(other(X), one(X), atol=1e-6)


def test_one_product_and_nothing_kept_when_the_last_part_is_taken():
    _, other = pair()
    calls = []
    other.q.layer.register_forward_hook(lambda *_: calls.append(1))
    other(X)
    assert calls == [1]
    assert other.q.kept == [None]


def test_a_part_of_another_input_is_made_anew():
    one, other = pair()
    other.q(X)
    assert torch.allclose(other.k(X + 1.0), one.k(X + 1.0), atol=1e-6)


def test_threads_do_not_take_each_others_parts():
    one, other = pair()
    given = [torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(other, given))
    assert all(torch.allclose(a, one(x), atol=1e-6) for a, x in zip(found, given, strict=True))


def test_a_copy_takes_from_its_own_first_layer():
    _, other = pair()
    again = copy.deepcopy(other)
    assert again.k.first[0] is again.q
    assert again.k.kept is again.q.kept
    assert again.q is not other.q


def test_compiled_as_one_graph():
    one, other = pair()
    assert torch.allclose(torch.compile(other, fullgraph=True, backend="eager")(X), one(X), atol=1e-6)
    assert other.q.kept == [None]


def test_the_weights_are_named_once():
    _, other = pair()
    assert sorted(other.state_dict()) == ["q.layer.bias", "q.layer.weight"]
    assert isinstance(other.q, PackedLinear)
    assert other.q.sizes == [12, 6, 6]


def test_a_layer_of_given_numbers_needs_no_bias():
    made = linear(torch.eye(3), None)
    assert made.bias is None
    assert not made.training
    assert torch.equal(made(torch.arange(3.0)), torch.arange(3.0))
