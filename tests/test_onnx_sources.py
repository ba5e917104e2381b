"""ONNX from everywhere: each exporter's graph of each kind of model, all attentions found, outputs equal after rewriting."""

from __future__ import annotations

import hf_models
import numpy as np
import onnx
import onnx_exports
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx_sources import EAGER_ONLY, EXPORTERS, FAMILIES, export, export_with_past, inputs, merged, past_inputs
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from onnxscript.rewriter.ort_fusions import optimize_for_ort

import attnopt

# What an exporter cannot export, with its own words.
NOT_EXPORTED = {
    ("whisper", "torchscript"): "Exporting the operator 'aten::diff' to ONNX opset version 17 is not supported",
}
CASES = [
    (family, "eager" if family in EAGER_ONLY or exporter in ("torchscript", "transformers") else "sdpa", exporter)
    for family in FAMILIES
    for exporter in EXPORTERS
]


def run(proto, named):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {name: x.numpy() for name, x in named.items()})


def equal(wanted, got):
    assert len(wanted) == len(got)
    for a, b in zip(wanted, got, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-4, rtol=1e-4)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("family", "attention", "exporter"), CASES)
def test_all_found_and_equal(family, attention, exporter):
    if (family, exporter) in NOT_EXPORTED:
        with pytest.raises(Exception, match=NOT_EXPORTED[family, exporter]):
            export(family, attention, exporter)
        return
    proto = export(family, attention, exporter)
    fast = attnopt.optimize(proto, inputs(family), select="always")
    assert len(fast.report.sites) == FAMILIES[family][3]
    assert fast.report.refusals == ()
    # No fused kernel has a soft cap and padding; a window is computed chunk by chunk.
    replaced = sum("window" in site.before for site in fast.report.sites) if family == "gemma2" else len(fast.report.sites)
    assert fast.report.fused == replaced
    other = inputs(family, batch=3, length=9)
    equal(run(proto, other), fast(other))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo", "transformers", "transformers-fused"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_steps_on_a_cache(family, exporter):
    """Another past, another number of new tokens; what is handed to the next step is equal as well."""
    proto = export_with_past(family, exporter)
    fast = attnopt.optimize(proto, named(proto, past_inputs(family)), select="always")
    assert len(fast.report.sites) == FAMILIES[family][3]
    assert "padding" in fast.report.sites[0].before or exporter == "torchscript"
    for past, new, batch in ((9, 1, 2), (2, 4, 1)):
        given = named(proto, past_inputs(family, past, new, batch))
        wanted, got = run(proto, given), fast(given)
        assert len(wanted) > 2 * FAMILIES[family][3]
        equal(wanted, got)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_first_and_later_steps_merged_in_one_file(family, exporter, tmp_path):
    """As optimum's decoder_model_merged.onnx: each branch has its attentions, and both stay what they were."""
    proto = merged(family, exporter)

    def given(past, new, batch, later):
        tensors = past_inputs(family, past, new, batch)
        if not later:
            tensors["attention_mask"] = tensors["attention_mask"][:, -new:].contiguous()
        return named(proto, tensors) | {"use_cache_branch": torch.tensor([later])}

    fast = attnopt.optimize(proto, given(5, 3, 2, True), select="always")
    assert len(fast.report.sites) == 2
    assert fast.report.refusals == ()
    if family == "llama":
        assert fast.report.fused == 2
    onnx.checker.check_model(onnx.load(fast.export(tmp_path / "fast.onnx")))
    for call in (given(9, 1, 2, True), given(2, 4, 1, True), given(0, 5, 2, False), given(0, 3, 1, False)):
        equal(run(proto, call), fast(call))


def named(proto, given):
    """The tensors under the names that an exporter chose; keys and values of all layers are alike."""
    names = [i.name for i in proto.graph.input if i.name != "use_cache_branch"]
    return dict(zip(names, given.values(), strict=True))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("multi_head", [False, True], ids=["attention", "multi_head_attention"])
def test_fused_by_onnxruntime(family, multi_head, tmp_path):
    """Its optimiser leaves no shapes in the file, and on GPT-2 it fuses all but the attention."""
    onnx.save(onnx_exports.export(family, "eager", "torchscript"), tmp_path / "plain.onnx")
    options = FusionOptions(family)
    options.use_multi_head_attention = multi_head
    fused = optimize_model(
        str(tmp_path / "plain.onnx"), model_type=family, num_heads=4, hidden_size=32, optimization_options=options, opt_level=0
    ).model
    given = onnx_exports.tensors(hf_models.inputs(family))
    fast = attnopt.optimize(fused, given, select="always")
    expected = "add(where(load(bias0, b, k), 0.0, -10000.0))" if family == "bert" else "causal & padding"
    assert [s.before for s in fast.report.sites] == [f"softmax heads(4) width(8) scale(0.3535534) {expected}"] * 2
    assert fast.report.fused == 2
    equal(run(fused, given), fast(given))


def test_fused_by_onnxscript():
    fused, _ = optimize_for_ort(onnx_ir.from_proto(export("llama", "sdpa", "dynamo")))
    proto = onnx_ir.to_proto(fused)
    assert "MultiHeadAttention" in [n.op_type for n in proto.graph.node]
    fast = attnopt.optimize(proto, inputs("llama"), select="always")
    assert [s.before for s in fast.report.sites] == ["softmax heads(4, 2) width(8) scale(0.3535534) causal & padding"]
    other = inputs("llama", batch=3, length=9)
    equal(run(proto, other), fast(other))
