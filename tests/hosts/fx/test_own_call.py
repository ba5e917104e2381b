"""The module's own call on the inputs of its graph: the same numbers, nothing left behind, and none where that cannot be."""

from __future__ import annotations

import pytest
import torch
from cached_step import Step
from cached_step import example as step_inputs
from self_attention import SelfAttention, example
from torch import nn

from attnopt.errors import InputMismatch
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.fx.own_call import Itself, own_call


def opened(model, inputs):
    host = FxHost.from_captured(capture(model, inputs))
    return host, host.example_inputs()


@pytest.mark.parametrize(("model", "inputs"), [(SelfAttention(), example()), (Step(), step_inputs())])
def test_its_outputs_are_those_of_the_graph(model, inputs):
    host, named = opened(model, inputs)
    own = own_call(model, host, named)
    wanted = host.runner()(named)
    got = own.outputs(named)
    assert len(got) == len(wanted) > 0
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
        assert not a.requires_grad
    assert model.training and all(m.training for m in model.modules())  # evaluated, and left as it was


class Writes(nn.Module):
    """Adds to its input in place, or counts its calls."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        if self.what == "state":
            self.count += 1
            return x + self.count
        return x.add_(1) if self.what == "input" else x + 1


@pytest.mark.parametrize(("what", "usable"), [("state", False), ("input", False), ("nothing", True)])
def test_a_call_that_leaves_its_mark_is_none(what, usable):
    model, x = Writes(what).eval(), torch.zeros(2, 3)
    host, named = opened(model, (x,))
    assert (own_call(model, host, named) is not None) == usable
    assert float(x.sum()) == float(named["x"].sum()) == 0.0


def test_a_program_is_all_that_there_is_of_it():
    model = SelfAttention().eval()
    host, named = opened(model, example())
    assert own_call(host.captured.program, host, named) is None


def test_it_refuses_what_an_optimised_model_refuses():
    model = SelfAttention().eval()
    host, named = opened(model, {"x": torch.randn(2, 5, 64), "many": False})
    call = Itself(own_call(model, host, named))
    x = torch.randn(3, 7, 64)
    torch.testing.assert_close(call(x), model(x, many=False))  # what is left out is as it was when traced
    for wrong in ((x, None, True), (x[..., :8],), (x.double(),)):
        with pytest.raises(InputMismatch):
            call(*wrong)
