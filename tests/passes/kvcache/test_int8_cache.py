"""int8 cache: what `cache(k=int8, v=int8)` means, in both hosts; steps that follow each other; signatures that it cannot change."""

from __future__ import annotations

from pathlib import Path

import hf_models
import pytest
import torch
from cached_step import Step, example
from rounded_steps import SEEN, check_step, inputs_of, opened, rewritten, whole
from torch import nn

import attnopt
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.site import Refusal
from attnopt.passes import Int8Cache
from attnopt.passes.edits.caches.rows import Rows


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("variant", ["int8", "int8 values", "int8 keys by channel"])
def test_equal_to_the_reference_with_the_clause(kind, variant):
    _, _, output = check_step(Int8Cache(), opened(kind), variant, SEEN)
    x, past = example()
    assert not torch.allclose(output, Step().eval()(x, past)[0], atol=1e-5)


def test_tensors_become_tuples_and_names_get_words(tmp_path: Path):
    host, model = opened("torch"), Step().eval()
    made, candidate = rewritten(Int8Cache(), host, "int8")
    assert candidate.description == (
        "past keys and values of 1 layers in int8: 128 -> 64 bytes per token; they come and go as codes, scales and zeros"
    )
    made.save_pt2(tmp_path / "step.pt2", {})
    x, past = example()
    for call in (made.callable(), attnopt.load(tmp_path / "step.pt2")):
        packed = tuple(tuple(Rows().packed(side)) for side in past)
        exact = past
        for _ in range(3):
            output, packed = call(x, packed)
            wanted, exact = model(x, exact)
            torch.testing.assert_close(output, wanted, atol=0.1, rtol=0.0)
        assert [[str(t.dtype) for t in side] for side in packed] == [["torch.int8", "torch.float32", "torch.float32"]] * 2
        assert packed[0][0].shape == (2, 2, 8, 8)
        for side, want in zip(packed, exact, strict=True):
            for got, stored in zip(side, Rows().packed(want), strict=True):
                assert torch.equal(got, stored)  # each token was rounded once, when it came
    with pytest.raises(attnopt.errors.InputMismatch):
        made.callable()(x, past)
    onnx = rewritten(Int8Cache(), opened("onnx"), "int8")[0]
    assert [s.name for s in onnx.input_specs] == ["x", *(f"past_{i}{word}" for i in (0, 1) for word in ("", "_scales", "_zeros"))]
    assert [n.removeprefix("output_1_") for n in onnx.output_names[1:]] == [
        f"{i}{word}" for i in (0, 1) for word in ("", "_scales", "_zeros")
    ]


def test_half_precision_is_rounded_in_single():
    host = FxHost.from_captured(capture(Step(torch.float16).eval(), example(torch.float16)))
    made, _ = rewritten(Int8Cache(), host, "int8")
    output, codes, *_ = made.runner()(made.adapt(inputs_of(host) | host.example_inputs()))
    assert (output.dtype, codes.dtype) == (torch.float16, torch.int8)
    torch.testing.assert_close(output, host.runner()(host.example_inputs())[0], atol=0.1, rtol=0.0)


class Fixed(Step):
    def forward(self, x, positions, keys, values):
        q, k, v = self.rows(x)
        keys, values = keys.index_copy(2, positions, k), values.index_copy(2, positions, v)
        return self.finished(x, nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)), keys, values


class Window(Step):
    def forward(self, x, past):
        q, k, v = self.rows(x)
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        out = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.finished(x, out), (k[:, :, -4:], v[:, :, -4:])


class Inside(Step):
    def forward(self, x):
        q, k, v = self.rows(x)
        return self.finished(x, nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def test_refusals():
    x, past = example()
    cases = [
        (Fixed(), (x, torch.tensor([2]), *past), "keys are written into places of a cache of fixed size"),
        (Window(), (x, past), "only a window of the keys goes out"),
        (Inside(), (x,), "no attention reads a cache that comes in and goes out of the model"),
    ]
    for model, given, reason in cases:
        refused = Int8Cache().propose(whole(FxHost.from_captured(capture(model.eval(), given))), None)
        assert isinstance(refused, Refusal) and reason in refused.reason
    model = hf_models.build("llama", "sdpa", layers=1)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        cache = model(ids).past_key_values
    host = FxHost.from_captured(capture(model, {"input_ids": ids[:, :1], "past_key_values": cache}))
    refused = Int8Cache().propose(whole(host), None)
    assert isinstance(refused, Refusal) and "a DynamicCache holds one tensor of keys and one of values" in refused.reason
