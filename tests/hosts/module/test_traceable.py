"""A live model is read by traces, exported and optimised again as what it is: its layers in codes stay, its kernels are left behind."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from live_models import generated, language_model, tokens

import attnopt
from attnopt.errors import UnsupportedFormat
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.module.changes import Change
from attnopt.hosts.module.copying import shared_copy
from attnopt.hosts.module.interface import BEFORE, HELD, NAME
from attnopt.hosts.module.layer_attention import LayerAttention
from attnopt.hosts.module.layers import Int8Linear, RoundedLinear, RoundedRows
from attnopt.hosts.module.model import LiveModel, as_live
from attnopt.hosts.module.traceable import runs_here, traceable
from attnopt.plan.live.converting import attach, changed, noted
from attnopt.runtime.dynamic_int8 import quantize_weight

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def fast():
    """One layer in int8, attention by our function."""
    model = language_model("llama")
    weight, scales = quantize_weight(model.get_submodule(LAYER).weight.detach())
    change = Change("int8", LAYER, tensors={"weight": weight, "scales": scales})
    made, calls = changed(model, [change]), noted(model, tokens())
    attach(made, {path: LayerAttention("softmax causal", call) for path, call in calls.items()}, windows=False)
    record = {"attention": "sdpa", "windows": False, "changes": [change.to_json()], "layers": {}, "report": {}, "plan": None}
    return as_live(made, None, None, record)


def test_it_is_of_its_own_class_with_its_own_attention_and_the_same_weights(fast):
    made = traceable(fast)
    assert type(made) is type(language_model("llama")) and made.config._attn_implementation == "sdpa"
    assert not hasattr(made.config, BEFORE) and not any(hasattr(m, HELD) for m in made.modules())
    assert made.get_submodule(LAYER).weight.data_ptr() == fast.get_submodule(LAYER).weight.data_ptr()
    assert isinstance(fast, LiveModel) and fast.config._attn_implementation == NAME and hasattr(fast, "report")


def test_what_can_be_traced_is_itself_and_flash_attention_is_read_by_sdpa():
    model = language_model("gpt2")
    assert traceable(model) is model and traceable(model.lm_head) is model.lm_head
    model.config._attn_implementation_internal = "flash_attention_2"
    made = traceable(model)
    assert runs_here(made) and not runs_here(model)
    assert (made.config._attn_implementation, model.config._attn_implementation) == ("sdpa", "flash_attention_2")


def test_a_layer_whose_keys_a_plan_hides_is_named(fast, monkeypatch):
    held = getattr(fast.get_submodule("model.layers.1.self_attn"), HELD)
    monkeypatch.setattr(type(held), "narrowed", True)
    with pytest.raises(UnsupportedFormat, match=r"a plan changed what this layer computes.*layers.\d.self_attn.*the original"):
        traceable(fast)


@pytest.mark.exhaustive  # traces the model once more
def test_the_graph_host_sees_layers_in_codes_and_attentions(fast):
    found = attnopt.inspect(fast, {**tokens(), "use_cache": False})
    assert len(found.sites) == 2 and "softmax" in str(found.sites[0].spec)


@pytest.mark.exhaustive  # traces the model once more
def test_a_traced_graph_of_it_takes_folds(fast):
    """Gains of norms go into the layers behind them, but for those that hold codes."""
    made = shared_copy(fast)
    for module in made.modules():
        if "Norm" in type(module).__name__:
            module.weight.data = torch.linspace(0.5, 1.5, module.weight.numel())
    given = {**tokens(), "use_cache": False}
    folded = attnopt.optimize(made, given, host="graph", passes=["fold-norm-gain", "pack-projections"], select="always")
    assert {s.rewrite for s in folded.report.plan.steps} == {"fold-norm-gain", "pack-projections"}
    with torch.no_grad():
        torch.testing.assert_close(folded(**given).logits, made(**given).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.exhaustive  # traces the model once more
def test_optimised_again_it_keeps_its_layers_in_codes_in_its_folder_too(fast, tmp_path):
    again = attnopt.optimize(fast, select="always", passes=["fuse-attention"])
    assert "the given model was live" in str(again.report) and getattr(again.config, BEFORE) == "sdpa"
    assert isinstance(again.get_submodule(LAYER), Int8Linear)
    again.save_pretrained(tmp_path)
    assert torch.equal(generated(attnopt.load(tmp_path), tokens()), generated(fast, tokens()))


def test_a_configuration_of_flash_attention_without_its_package(tmp_path):
    """transformers refuses to load such a model here; one that was loaded elsewhere runs on what is there, from a folder too."""
    model, given = language_model("llama"), language_model("llama")
    given.config._attn_implementation_internal = "flash_attention_2"
    made, calls = changed(given, []), noted(given, tokens())
    attach(made, {path: LayerAttention("softmax causal", call) for path, call in calls.items()}, windows=False)
    record = {"attention": "flash_attention_2", "windows": False, "changes": [], "layers": {}, "report": {}, "plan": None}
    fast = as_live(made, None, None, record)
    assert getattr(fast.config, BEFORE) == "flash_attention_2"
    for prompt in (tokens(), tokens(padded=2)):
        assert torch.equal(generated(fast, prompt), generated(model, prompt))
    fast.save_pretrained(tmp_path)
    assert torch.equal(generated(attnopt.load(tmp_path), tokens()), generated(model, tokens()))


def test_layers_and_tables_in_codes_are_onnx():
    torch.manual_seed(0)
    weight, scales = quantize_weight(torch.randn(16, 16))
    codes, options = torch.randint(0, 256, (8, 8), dtype=torch.uint8), {"bits": 4, "middle": 8.0}
    layers = torch.nn.Sequential(
        RoundedRows({"codes": codes, "steps": torch.rand(8, 1)}, **options, channels=16),
        Int8Linear({"weight": weight, "scales": scales, "bias": torch.randn(16)}),
        RoundedLinear({"codes": codes, "steps": torch.rand(8, 1), "bias": torch.randn(8)}, **options),
    ).eval()
    ids = torch.tensor([5, 0, 7])
    proto = FxHost.from_captured(capture(layers, (ids,))).to_onnx()
    assert {node.op_type for node in proto.graph.node if node.domain} == {"GatherBlockQuantized", "MatMulNBits"}
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    np.testing.assert_allclose(found, layers(ids).numpy(), rtol=1e-4, atol=1e-4)
