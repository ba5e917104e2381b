"""Local attention on chunks: equal to the reference on every mask that proves a band, by two runtimes, at every length."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest
import torch
from hosts.onnx import small_models
from lowering_cases import CASES, check
from onnx.reference import ReferenceEvaluator
from windows import SETTINGS, Setting

from attnopt.codegen.library.local_attention import LocalAttention
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.reference import attend, reference
from attnopt.ir.site import Refusal
from attnopt.ir.spec import parse
from attnopt.patterns import recognise

WINDOWS = ("window", "window_or_global", "window_of_one", "window_of_all", "window_both_sides", "softcap_window")


def rewritten(setting: Setting, **model: object) -> OnnxHost:
    """The model of one setting with its attention on chunks, in standard operators only."""
    host = OnnxHost.from_model(setting.model(**model))
    site = setting.site(host)
    assert LocalAttention().supports(site, "any runtime") is None
    made = LocalAttention().emit(site, host.builder(site.output.value.producer))
    host.replace(site.output.value, made)
    host.finish()
    assert "Attention" not in {n.op_type for n in host.model.graph}
    assert {n.domain for n in host.model.graph} == {""}
    return host


@pytest.mark.parametrize("name", SETTINGS)
def test_equal_to_the_reference_at_every_length(name):
    """One model with an open length: shorter than the window, than a chunk, no multiple of it, several chunks."""
    setting = SETTINGS[name]
    run = rewritten(setting).runner()
    tolerance = 5e-3 if setting.dtype == "float16" else 2e-5
    for batch, length in ((1, 1), (2, 5), (2, 64), (1, 131), (2, 200)):
        for padding in ("left", "right") if "padding" in setting.operands else ("",):
            data = setting.data(batch, length, padding)
            made, wanted = run(data)[0], setting.wanted(data)
            assert bool(made.isfinite().all())
            if "free" in setting.spec:  # rows that see no key may hold anything finite
                seen = attend(setting.spec, **data).lse[..., None].isfinite()
                made, wanted = made * seen, wanted * seen
            torch.testing.assert_close(made, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["window", "padding", "padding_zero", "bias", "causal_blocks", "documents"])
@pytest.mark.parametrize("length", [5, 70])
def test_equal_in_the_reference_implementation_of_onnx(name, length):
    setting = SETTINGS[name]
    data = setting.data(2, length, "left")
    evaluator = ReferenceEvaluator(onnx_ir.to_proto(rewritten(setting).model))
    (made,) = evaluator.run(None, {n: t.numpy() for n, t in data.items()})
    torch.testing.assert_close(torch.from_numpy(np.asarray(made)), setting.wanted(data), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["window", "padding", "both_sides", "blocks", "bias"])
def test_sizes_that_are_known(name):
    setting = SETTINGS[name]
    for length in (300, 256):
        data = setting.data(2, length, "left")
        (made,) = rewritten(setting, batch=2, length=length).runner()(data)
        torch.testing.assert_close(made, setting.wanted(data), atol=2e-5, rtol=2e-5)


def refusal(setting: Setting, **model: object) -> Refusal:
    found = LocalAttention().supports(setting.site(OnnxHost.from_model(setting.model(**model))), "onnxruntime")
    assert found is not None
    return found


REFUSED = {
    "no_window": (Setting("softmax causal"), "proves no window"),
    "window_or_more": (Setting("softmax causal & (window(20) | last(4))"), "proves no window"),
    "no_mask": (Setting("softmax"), "proves no window"),
    "one_side": (Setting("softmax window(20)"), "proves no window"),
    "offset": (Setting("softmax offset(3) causal & window(20)"), "do not start at position 0"),
    "normaliser": (Setting("sigmoid causal & window(20)"), "normaliser"),
    "score_term": (Setting("softmax mod(relu) causal & window(20)"), "score term 'mod(relu)'"),
    "sink": (Setting("softmax causal & window(20) sink(load(s, h))", operands={"s": "h"}), "sink"),
    "tensor_scale_first": (
        Setting("softmax scale(load(s, h)) scale(0.5) causal & window(20)", operands={"s": "h"}), "a tensor stands first",
    ),
    "computed_places": (
        Setting("softmax add(load(table, 0, h, 0, max(q - k, 0))) causal & window(20)", operands={"table": "1h1k"}), "computed places",
    ),
    "diagonal_load": (Setting("softmax add(load(x, q, q)) causal & window(20)", operands={"x": "qk"}), "computed places"),
    "rank": (Setting("softmax add(load(x, h, q, k)) causal & window(20)", operands={"x": "qk"}), "another rank"),
    "unknown_operand": (Setting("softmax causal & window(20) & padding"), "'padding' is not an operand"),
    "unknown_length": (Setting("softmax causal & window(20) & k < size(memory)"), "size(memory)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    setting, reason = REFUSED[name]
    assert reason in refusal(setting).reason


def test_refused_where_there_is_nothing_to_gain():
    assert "cover all 80 keys" in refusal(SETTINGS["window"], length=80).reason
    assert "cover all 48 keys" in refusal(SETTINGS["blocks"], length=48).reason


def test_refused_where_queries_and_keys_differ():
    host = OnnxHost.from_model(small_models.attention(23, ("batch", 4, "length", 8), ("batch", 4, "all", 8)))
    (site,) = recognise(host.graph).sites
    refused = LocalAttention().supports(site.with_step("test", parse("softmax causal & window(20)")), "onnxruntime")
    assert "differ in number" in refused.reason


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_opsets(opset):
    host = OnnxHost.from_model(small_models.spelled_out(opset))
    (site,) = recognise(host.graph).sites
    spec = "softmax scale(0.3535534) causal & window(20)"
    made = LocalAttention().emit(site.with_step("test", parse(spec)), host.builder(site.output.value.producer))
    host.replace(site.output.value, made)
    host.finish()
    data = {n: torch.randn(2, 4, 90, 8) for n in "qkv"}
    torch.testing.assert_close(host.runner()(data)[0], reference(spec, **data), atol=2e-5, rtol=2e-5)


def test_memory_grows_with_the_length():
    """No tensor of the graph holds a score for every pair of positions."""
    host = rewritten(SETTINGS["padding"], batch=1, length=4096)
    sizes = [int(np.prod(v.shape.numpy())) for n in host.model.graph for v in n.outputs if v.shape is not None]
    assert max(sizes) < 4 * 4096 * 200


@pytest.mark.parametrize("name", CASES)
def test_the_table_of_all_lowerings(name):
    found = "" if name in WINDOWS else f"mask '{parse(CASES[name].spec).mask}' proves no window on both sides of a query"
    check(LocalAttention(), CASES[name], found)
