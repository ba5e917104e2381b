"""State in buffers: static caches of transformers step by step, the user's model untouched, equal runs, saved files."""

from __future__ import annotations

import pytest
import torch
from static_caches import decoder, step, texts, with_cache
from torch import nn
from transformers.integrations.executorch import convert_and_export_with_cache

import attnopt
from attnopt.codegen.tvm.availability import missing
from attnopt.errors import UnsupportedFormat, UntraceableModel
from attnopt.hosts.fx import FxHost, capture

# With a soft cap and heads so narrow only TVM has a kernel; the graph is rewritten to a functional one all the same.
FUSED = {"llama": 2, "gemma2": 2 if missing() is None else 0}


def operators(call):
    return [str(n.target) for n in call.module.graph_module.graph.nodes if n.op == "call_function"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", FUSED)
def test_a_static_cache_step_by_step(family, batch, tmp_path):
    model = with_cache(family, batch)
    fast = attnopt.optimize(model, step(0, batch), select="always")
    assert fast.report.fused == FUSED[family]
    assert len(fast.report.sites) == 2
    assert all(not buffer.any() for name, buffer in model.named_buffers() if "cache" in name)
    wanted, got, again = texts(model, fast, attnopt.load(fast.export(tmp_path / "fast.pt2")), batch=batch)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, wanted, atol=1e-5, rtol=1e-5)
    assert wanted.std(0).max() > 0.01  # another token, another answer
    assert sum("index_copy_" in name for name in operators(fast)) == 4
    assert "aten.index_copy.default" not in operators(fast)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("family", FUSED)
def test_programs_of_the_recipe(family, strict):
    model = with_cache(family)
    model.model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 16}
    program = convert_and_export_with_cache(model.model, strict=strict)
    fast = attnopt.optimize(program, select="always")
    assert fast.report.fused == FUSED[family]
    wanted, got = texts(model, fast)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_prompt_of_any_length():
    model = with_cache("llama")
    fast = attnopt.optimize(model, step(0, count=4), select="always")
    assert fast.report.fused == 2
    with torch.no_grad():
        for at, count in ((0, 5), (5, 2), (7, 6)):
            torch.testing.assert_close(fast(**step(at, count=count)), model(**step(at, count=count)), atol=1e-5, rtol=1e-5)


def test_every_run_of_a_host_starts_alike():
    host = FxHost.from_captured(capture(with_cache("llama"), step(3)))
    run, inputs = host.runner(), host.example_inputs()
    first, second = run(inputs)[0], run(inputs)[0]
    assert torch.equal(first, second)
    one, two = host.callable(), host.callable()
    with torch.no_grad():
        one(**step(0))
        one(**step(1))
        assert not torch.equal(one(**step(2)), two(**step(2)))
    assert torch.equal(run(inputs)[0], first)
    assert all(not value.any() for name, value in host.module.named_buffers() if "cache" in name)


def test_state_is_read_as_input_and_output_of_the_graph():
    """Numbers that the model writes are no constants: nothing may be proved from what they hold now."""
    graph = FxHost.from_captured(capture(with_cache("llama"), step(0))).graph
    state = [v for v in graph.inputs if "cache" in v.name and v.name != "cache_position"]
    assert sorted(v.name for v in state) == ["key_cache_0", "key_cache_1", "value_cache_0", "value_cache_1"]
    assert not any(v.is_constant for v in state)
    assert sum(v.producer is not None and v.producer.op == "scatter" for v in graph.outputs) == 4


def test_onnx_files_keep_no_state(tmp_path):
    fast = attnopt.optimize(with_cache("llama"), step(0), select="always")
    with pytest.raises(UnsupportedFormat, match="keeps no state between calls, and this model writes"):
        fast.export(tmp_path / "fast.onnx")
    assert list(tmp_path.iterdir()) == []


class Held(nn.Module):
    """Writes rows of a tensor that it reaches through a list; `registered`: a buffer as well; `returned`: handed out."""

    def __init__(self, registered: bool, returned: bool = False, overlapping: bool = False) -> None:
        super().__init__()
        whole = torch.zeros(6, 8)
        self.held = [whole, whole[:4]] if overlapping else [torch.zeros(4, 8), torch.zeros(4, 8)]
        self.returned = returned
        if registered:
            self.register_buffer("first", self.held[0], persistent=False)

    def forward(self, x, at):
        for cache in self.held:
            cache.index_copy_(0, at, x)
        both = self.held[0] @ self.held[1].T
        return (x * both.sum(), self.held[0].view(32)) if self.returned else x.T @ both[:2]


def rows(at):
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(at)), torch.tensor([at % 4, (at + 1) % 4])


@pytest.mark.parametrize("registered", [False, True])
def test_tensors_that_are_no_buffers(registered):
    call, model = FxHost.from_captured(capture(Held(registered).eval(), rows(0))).callable(), Held(registered).eval()
    with torch.no_grad():
        for at in range(5):
            torch.testing.assert_close(call(*rows(at)), model(*rows(at)))
    assert sum(n.target is torch.ops.aten.index_copy_.default for n in call.graph_module.graph.nodes) == 2


def test_state_that_is_handed_out_is_not_written_in_place():
    """The caller's tensor must not change with the next call."""
    call = FxHost.from_captured(capture(Held(True, returned=True).eval(), rows(0))).callable()
    written = [n for n in call.graph_module.graph.nodes if n.target is torch.ops.aten.index_copy_.default]
    assert len(written) == 1
    with torch.no_grad():
        _, kept = call(*rows(0))
        before = kept.clone()
        call(*rows(1))
    assert torch.equal(kept, before)


def test_state_in_overlapping_views_is_refused():
    with pytest.raises(UntraceableModel, match="cannot make the program free of in-place operations"):
        capture(Held(True, overlapping=True).eval(), rows(0))


def test_decoders_of_the_recipe_are_those_without_it():
    """The static cache gives what the model gives for the whole text, so that its steps are worth comparing with."""
    for family in FUSED:
        ids = torch.cat([step(at)["input_ids"] for at in range(5)], 1)
        with torch.no_grad():
            wanted = decoder(family)(input_ids=ids, use_cache=False).logits[:, -1]
        (got,) = texts(with_cache(family), steps=5)
        torch.testing.assert_close(got[-1], wanted, atol=1e-5, rtol=1e-5)
