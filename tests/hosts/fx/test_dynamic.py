"""Which inputs grow before they are traced, and which of their dimensions may vary."""

from __future__ import annotations

import pytest
import torch
from cached_step import Step, example
from torch import nn

from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.fx.dynamic import cached_leaves, enlarged, named_dims

X, KEYS = torch.zeros(1, 1, 32), torch.zeros(1, 2, 5, 8)


class Plain(Step):
    """The cache as two tensors with names of their own."""

    def forward(self, x, keys, values):
        return super().forward(x, (keys, values))


@pytest.mark.parametrize(
    ("arguments", "cached"),
    [
        ({"x": X, "past": (KEYS, KEYS)}, {1, 2}),
        ({"x": X, "keys": KEYS, "values": torch.zeros(1, 2, 5, 16)}, {1, 2}),  # values may be wider
        ({"x": X, "pixel_values": torch.zeros(1, 3, 16, 16)}, set()),  # one image is no pair
        ({"x": torch.zeros(1, 4, 32), "keys": KEYS, "values": KEYS}, set()),  # no step of one token
        ({"q": KEYS, "k": KEYS, "v": KEYS}, set()),  # the operands of an attention
    ],
)
def test_what_is_a_cache(arguments, cached):
    assert cached_leaves(arguments) == cached


def test_a_step_on_a_cache_stays_a_step():
    grown = enlarged({"x": X, "keys": KEYS, "values": KEYS})
    assert (grown["x"].shape, grown["keys"].shape) == ((2, 1, 32), (2, 2, 5, 8))
    assert enlarged({"x": X})["x"].shape == (2, 2, 32)
    dims = named_dims(grown)
    assert 1 not in dims[0] and dims[1][2] is dims[2][2]


def test_plain_tensors_as_a_cache_of_any_length():
    x, (keys, values) = example()
    model = Plain().eval()
    host = FxHost.from_captured(capture(model, (x[:1], keys[:1], values[:1])))
    assert [tuple(s.shape) for s in host.input_specs] == [(None, 1, 32), (None, 2, None, 8), (None, 2, None, 8)]
    longer = (x, *(torch.randn(2, 2, 9, 8) for _ in range(2)))
    got, wanted = host.callable()(*longer), model(*longer)
    torch.testing.assert_close(got[0], wanted[0])
    assert got[1][0].shape == (2, 2, 10, 8)


def test_one_token_alone_grows():
    host = FxHost.from_captured(capture(nn.Linear(32, 4), (X,)))
    assert tuple(host.input_specs[0].shape) == (None, None, 32)
