"""Work grows with the graph and no faster, counted in calls of Python functions, which no busy machine changes."""

from __future__ import annotations

import sys

import long_graph
import pytest

from attnopt.hosts.onnx import OnnxHost
from attnopt.patterns import recognise
from attnopt.plan.choose import apply_choices, choose


def calls(work):
    """How many Python functions are entered while this runs."""
    count = 0

    def entered(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(entered)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def recognised(layers):
    host = OnnxHost.from_model(long_graph.model(layers))
    return lambda: recognise(host.graph)


def rewritten(layers):
    host = OnnxHost.from_model(long_graph.model(layers))
    chosen = choose(host, recognise(host.graph).sites, None, runtime="onnxruntime", opset=host.opset, select="always")
    return lambda: apply_choices(host, chosen)


@pytest.mark.parametrize("work", [recognised, rewritten])
def test_twice_the_layers_twice_the_work(work):
    small, large = (calls(work(layers)) for layers in (8, 32))
    assert 3.0 < large / small < 4.4


def test_everything_is_found():
    host = OnnxHost.from_model(long_graph.model(5))
    found = recognise(host.graph)
    assert [str(s.spec) for s in found.sites] == ["softmax heads(2, 1) width(8) scale(0.3535534) causal & padding"] * 5
    assert found.refusals == ()
