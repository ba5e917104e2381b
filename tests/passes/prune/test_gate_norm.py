"""Gate-Norm: its score, its order, and removed sublayers that equal output projections of zeros, with and without a cache."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import block_models
import hf_models
import onnx
import onnx_ir
import pytest
import torch
import transformers

import attnopt
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.site import Refusal
from attnopt.passes import GateNorm, Group
from attnopt.passes.prune.gate_norm import gate_norm
from attnopt.patterns import recognise
from attnopt.patterns.block import find_blocks


def group_of(host):
    found = recognise(host.graph)
    return Group(host, found.sites, blocks=tuple(find_blocks(host.graph, found.sites)))


def test_the_score_is_the_norm_of_the_product():
    q, k = torch.randn(6, 4, 24, dtype=torch.float64), torch.randn(2, 4, 24, dtype=torch.float64)
    keys = k.repeat_interleave(3, 0)
    whole = (q.flatten(0, 1).T @ keys.flatten(0, 1)).norm()
    by_head = (q.mT @ keys).square().sum().sqrt()
    assert gate_norm(q, k) == pytest.approx(float(whole), rel=1e-12)
    assert gate_norm(q, k, per_head=True) == pytest.approx(float(by_head), rel=1e-12)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    for per_head in (False, True):
        wanted = gate_norm(q, k, per_head=per_head)
        assert gate_norm(turn @ q, turn @ k, per_head=per_head) == pytest.approx(wanted, rel=1e-12)
        assert gate_norm(3 * q, k / 3, per_head=per_head) == pytest.approx(wanted, rel=1e-12)
        assert gate_norm(q, 0 * k, per_head=per_head) == 0.0


@functools.cache
def decoder(layers=3):
    """Layer 2 has keys of zeros, layer 0 nearly so: those go first, and with layer 0 the input that tells how long the past is."""
    model = hf_models.build("llama", "sdpa", layers=layers)
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight.zero_()
        model.model.layers[0].self_attn.k_proj.weight.mul_(0.1)
    return model


def without(model, names):
    """The same model with output projections of zeros."""
    made = copy.deepcopy(model)
    for name in names:
        attention = made.get_submodule(name)
        layer = next(x for x in (getattr(attention, n, None) for n in ("o_proj", "c_proj", "out_proj", "dense")) if x is not None)
        layer.weight.data.zero_()
        if layer.bias is not None:
            layer.bias.data.zero_()
    return made


def past_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True).past_key_values


def pruned(host, removed):
    group = group_of(host)
    candidate = GateNorm(most=0.7).propose(group, None)[removed - 1]
    copied = host.copy()
    GateNorm().apply(candidate, group_of(copied))
    copied.finish()
    return copied, candidate.options["sites"]


IDS = torch.randint(0, hf_models.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


@functools.cache
def hosts():
    """Prefill and one step of the decoder, and the step in ONNX."""
    model = decoder()
    prefill = FxHost.from_captured(capture(model, {"input_ids": IDS}))
    step = FxHost.from_captured(capture(model, {"input_ids": IDS[:, :1], "past_key_values": past_of(model, IDS)}))
    return prefill, step, OnnxHost.from_model(step.to_onnx())


@pytest.mark.exhaustive
def test_a_pruned_decoder_decodes_with_its_cache(tmp_path: Path):
    """Token for token what the model with output projections of zeros computes without one; the cache has fewer layers."""
    prefill, step, _ = hosts()
    (first, removed), (second, again) = pruned(prefill, 2), pruned(step, 2)
    assert removed == again == ["model.layers.2.self_attn", "model.layers.0.self_attn"]
    reference, path = without(decoder(), removed), tmp_path / "step.pt2"
    second.save_pt2(path, {})
    start, saved = first.callable(), attnopt.load(path)
    for call in (second.callable(), saved):
        with torch.no_grad():
            wanted = reference(IDS, use_cache=False).logits
        result = start(IDS[:, :4])
        torch.testing.assert_close(result.logits, wanted[:, :4], atol=1e-6, rtol=1e-6)
        for at in range(4, 9):
            cache = result.past_key_values
            assert isinstance(cache, transformers.DynamicCache)
            assert (len(cache.layers), cache.get_seq_length()) == (1, at)
            result = call(input_ids=IDS[:, at : at + 1], past_key_values=cache)
            torch.testing.assert_close(result.logits[:, 0], wanted[:, at], atol=1e-6, rtol=1e-6)
    assert not any(
        "layers_0_self_attn" in str(n.target) or "layers_2_self_attn" in str(n.target) for n in second.module.graph.nodes
    )
    with pytest.raises(attnopt.errors.InputMismatch, match="nested in another way"):
        second.callable()(input_ids=IDS[:, :1], past_key_values=past_of(decoder(), IDS))


def test_in_onnx_inputs_and_outputs_of_the_cache_move_up():
    _, torch_host, host = hosts()
    made, removed = pruned(host, 2)
    names = [s.name for s in made.input_specs]
    assert names[1:] == [f"past_key_values_{kind}_cache_{i}" for kind in ("key", "value") for i in range(1)]
    assert made.output_names[1:] == [f"present_key_values_{kind}_cache_{i}" for kind in ("key", "value") for i in range(1)]
    onnx.checker.check_model(onnx_ir.to_proto(made.model), full_check=True)
    reference, past = without(decoder(), removed), past_of(decoder(), IDS)
    given = {"input_ids": IDS[:, :1]} | {
        f"past_key_values_{kind}_cache_{i}": getattr(layer, f"{kind}s")
        for kind in ("key", "value")
        for i, layer in enumerate(past.layers)
    }
    assert torch_host.named_inputs({"input_ids": IDS[:, :1], "past_key_values": past}).keys() == given.keys()
    for again in (made, made.copy()):
        logits, *present = again.runner()(again.adapt(given))
        wanted = reference(input_ids=IDS[:, :1], past_key_values=copy.deepcopy(past))
        torch.testing.assert_close(logits, wanted.logits, atol=1e-6, rtol=1e-6)
        layers = [wanted.past_key_values.layers[i] for i in (1,)]
        for got, want in zip(present, [x.keys for x in layers] + [x.values for x in layers], strict=True):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def albert():
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, embedding_size=16, num_hidden_groups=1,
        vocab_size=hf_models.VOCABULARY, inner_group_num=2,
    )  # fmt: skip
    return transformers.AlbertModel(config).eval()


def test_layers_that_hold_the_same_weights_are_one_decision():
    model = albert()
    members = model.encoder.albert_layer_groups[0].albert_layers
    scores = [gate_norm(*(getattr(x.attention, n).weight.detach().view(4, 8, 32) for n in ("query", "key"))) for x in members]
    less = without(model, [f"encoder.albert_layer_groups.0.albert_layers.{scores.index(min(scores))}.attention"])
    host = FxHost.from_captured(capture(model, {"input_ids": IDS}))
    for each in (host, OnnxHost.from_model(host.to_onnx())):
        (candidate,) = GateNorm().propose(group_of(each), None)
        assert candidate.kind == "2 of 4"
        made, _ = pruned(each, 1)
        got = made.runner()({"input_ids": IDS})[0]
        torch.testing.assert_close(got, less(IDS).last_hidden_state, atol=1e-6, rtol=1e-6)
        assert not torch.allclose(got, model(IDS).last_hidden_state, atol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "bert"])
def test_blocks_of_other_forms(family):
    """A packed layer with a bias; a parallel block; a norm after the addition."""
    model = block_models.build(family, "eager")
    example = block_models.inputs(family)
    host = FxHost.from_captured(capture(model, example))
    group = group_of(host)
    refused = GateNorm().propose(group, None)
    assert isinstance(refused, Refusal) and "no layer may go: 1 layers" in refused.reason  # the last one stays
    candidate = GateNorm().candidate(next(iter(GateNorm().ranked(group)))[1], 1, 0.0)
    made = host.copy()
    GateNorm().apply(candidate, group_of(made))
    made.finish()
    assert recognise(made.graph).sites == ()
    path = "encoder.layer.0.attention.output" if family == "bert" else block_models.FAMILIES[family].attention
    with torch.no_grad():
        wanted = without(model, [path])(**example)[0]
    torch.testing.assert_close(made.runner()(made.adapt(host.example_inputs()))[0], wanted, atol=1e-6, rtol=1e-6)


def test_flags_and_refusals():
    prefill, _, _ = hosts()
    group = group_of(prefill)
    names = [[s.site.name for s in sublayers] for _, sublayers in GateNorm().ranked(group)]
    assert names[:2] == [["model.layers.2.self_attn"], ["model.layers.0.self_attn"]]
    assert [s.site.name for _, (s,) in GateNorm(protect=1).ranked(group)][:1] == ["model.layers.2.self_attn"]
    assert "model.layers.0.self_attn" not in [s.site.name for _, (s,) in GateNorm(protect=1).ranked(group)]
    plain, folded = (GateNorm(fold_norm_gain=fold).score(group.blocks[1]) for fold in (False, True))
    assert plain == pytest.approx(folded)  # an untrained norm has a gain of ones
    assert [len(c.options["sites"]) for c in GateNorm(most=1.0).propose(group, None)] == [1, 2]
    cross = block_models.build("bart", "eager")
    host = FxHost.from_captured(capture(cross, block_models.inputs("bart")))
    kept = {s.site.name for _, sublayers in GateNorm().ranked(group_of(host)) for s in sublayers}
    assert "model.decoder.layers.0.encoder_attn" not in kept and "model.decoder.layers.0.self_attn" in kept
