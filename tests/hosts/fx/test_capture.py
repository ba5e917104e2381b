"""What torch.export recorded but cannot run is said to be so at once."""

from __future__ import annotations

import pytest
import torch

from attnopt.errors import UntraceableModel
from attnopt.hosts.fx.capture import capture, require_that_it_is_whole


def test_the_inside_of_a_vmap_is_refused():
    class Doubled(torch.nn.Module):
        def forward(self, x):
            return x + x

    program = torch.export.export(Doubled(), (torch.randn(3, 2),), strict=False)
    require_that_it_is_whole(program, "Doubled")
    graph = program.graph
    added = next(n for n in graph.nodes if n.op == "call_function")
    with graph.inserting_before(added):
        inside = graph.call_function(torch._C._functorch._add_batch_dim, (added.args[0], 0, 1))
    added.args = (inside, inside)
    with pytest.raises(UntraceableModel, match="inside of a vmap of Doubled") as caught:
        require_that_it_is_whole(program, "Doubled")
    assert "4-D attention_mask" in str(caught.value)


def test_the_strides_of_an_example_are_not_traced():
    """torch's ONNX exporter refuses some models of which an example input is a slice."""
    ids = torch.arange(24).reshape(2, 12)[:, :5]
    captured = capture(torch.nn.Embedding(24, 3), (ids,))
    assert not ids.is_contiguous()
    (held,) = captured.example.values()
    assert held.is_contiguous()
    assert torch.equal(held, ids)
