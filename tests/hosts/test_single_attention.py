"""Models of one attention: both hosts find it, and it computes what the spec says."""

from __future__ import annotations

import pytest
import torch

from attnopt.hosts.single_attention import example, single_attention
from attnopt.ir.reference import reference
from attnopt.patterns import recognise

SHAPE = {"b": 2, "h": 4, "g": 2, "q": 6, "k": 9, "d": 8, "e": 8}


@pytest.mark.parametrize("host", ["torch", "onnx"])
@pytest.mark.parametrize("grouped", [True, False])
def test_one_attention(host, grouped):
    shape = SHAPE if grouped else {**SHAPE, "g": 4, "k": 6}
    made = single_attention(host, shape)
    (site,) = recognise(made.graph).sites
    assert str(site.spec) == ("softmax heads(4, 2) width(8)" if grouped else "softmax heads(4) width(8)")
    given = example(shape)
    (result,) = made.runner()(given)
    wanted = reference("softmax", given["q"], given["k"], given["v"])
    torch.testing.assert_close(result, wanted, atol=1e-5, rtol=1e-5)


def test_examples_are_the_same_each_time():
    first, second = example(SHAPE), example(SHAPE)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["padding"].sum() == 2 * 8
    assert example({**SHAPE, "k": 1})["padding"].all()
