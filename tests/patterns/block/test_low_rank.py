"""Multi-head latent attention (DeepSeek): queries, keys and values in two steps, keys joined from a latent and a rotary part."""

from __future__ import annotations

import json
import logging
import warnings
from typing import Any

import block_models
import pytest
import torch
import transformers
from spelling import B, L, Recorder

import attnopt
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.onnx import OnnxHost
from attnopt.ir.block import CacheUpdate, Joined, Projection, Rotary, turn
from attnopt.ir.block_reference import as_rows, computed, rows
from attnopt.ir.block_spec import lifted
from attnopt.ir.site import Refusal
from attnopt.patterns import recognise
from attnopt.patterns.block import find_block

LATENT, NOPE, ROPE, VALUE = 8, 8, 4, 8
SIZES = {
    "kv_lora_rank": LATENT,
    "qk_rope_head_dim": ROPE,
    "qk_nope_head_dim": NOPE,
    "v_head_dim": VALUE,
    "num_key_value_heads": 4,
}
EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
# What turns is read as neighbours; version 3 writes it as halves, version 2 (complex numbers) as neighbours.
KINDS = {
    "deepseek_v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM, "interleaved", [0, 1, 2, 3]),
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM, "half", [0, 2, 1, 3]),
}
K, V = "k 8x32 of low rank (32x8) + 32x4 for all heads", "v 8x32 of low rank (32x8)"


def build(kind: str, q_rank: int | None = 12) -> Any:
    torch.manual_seed(0)
    config, model, _, _ = KINDS[kind]
    return model(config(**block_models.PLAIN, **SIZES, **EXPERTS, q_lora_rank=q_rank)).eval()


def found_in(host):
    (site,) = recognise(host.graph).sites
    return site, find_block(host.graph, site)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("q_rank", [12, None])
@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_two_parts(kind, q_rank):
    model = build(kind, q_rank)
    host = FxHost.from_captured(capture(model, block_models.inputs("llama")))
    site, block = found_in(host)
    _, _, pairs, order = KINDS[kind]
    q = "q 32x48" if q_rank is None else "q 12x48 of low rank (32x12)"
    assert str(block) == f"rms_norm -> {q}, {K}, {V}; rotary 4 from 8 {pairs} base 10000; o 32x32; residual"
    assert not block.missing
    assert not block.cross
    attention = model.model.layers[0].self_attn
    latent, rotary = block.projections("k")
    held = attention.kv_a_proj_with_mqa.weight
    assert torch.equal(latent.rows(), attention.kv_b_proj.weight.view(4, NOPE + VALUE, LATENT)[:, :NOPE])
    assert torch.equal(latent.down.rows().flatten(0, 1), held[:LATENT])
    assert torch.equal(latent.down_norm.gain(), attention.kv_a_layernorm.weight)
    assert torch.equal(rotary.rows(), held[LATENT:][order].expand(4, ROPE, 32))
    assert rotary.for_all_heads and not latent.for_all_heads
    assert torch.equal(block.v.rows(), attention.kv_b_proj.weight.view(4, NOPE + VALUE, LATENT)[:, NOPE:])
    assert torch.equal(block.v.down.rows().flatten(0, 1), held[:LATENT])
    assert latent.weight is block.v.weight and latent.down.weight is rotary.weight  # what changes one, changes the other
    if q_rank is not None:
        assert torch.equal(
            block.q.rows(), attention.q_b_proj.weight.view(4, NOPE + ROPE, q_rank)[:, [*range(8), *(8 + i for i in order)]]
        )
        assert torch.equal(block.q.down.rows().flatten(0, 1), attention.q_a_proj.weight)
        assert torch.equal(block.q.down_norm.gain(), attention.q_a_layernorm.weight)
    assert (block.rotary.first, block.rotary.dims, block.rotary.on) == (NOPE, ROPE, ("q", "k"))
    assert turn(block.streams["k"]).same(turn(block.streams["q"]))
    assert isinstance(lifted(site, block), Refusal)
    assert "joined from several layers" in lifted(site, block).reason


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_computed_again_from_the_hidden_states(kind):
    host = FxHost.from_captured(capture(build(kind), block_models.inputs("llama")))
    site, block = found_in(host)
    x, wanted, positions = host.tap([block.hidden, site.k.value, block.rotary.positions.value], host.example_inputs())
    wanted = as_rows(site.k, wanted, site.axes)
    given = as_rows(block.rotary.positions, positions, site.axes)[..., 0, 0]
    again = rows(block, "k", x.reshape(wanted.shape[0], -1, 32), positions=given)
    assert wanted[..., :NOPE].abs().max() > 0.01 and wanted[..., NOPE:].abs().max() > 0.01
    torch.testing.assert_close(again, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_what_is_cached(kind):
    """Past latents are joined between the two layers of the pair, past rotary rows behind their rotation."""
    model, ids = build(kind), torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        past = model(input_ids=ids, use_cache=True).past_key_values
    host = FxHost.from_captured(capture(model, {"input_ids": ids[:, :3], "past_key_values": past}))
    site, block = found_in(host)
    assert not block.missing
    cached = "of low rank (32x8, cached)"
    assert f"k 8x32 {cached} + 32x4 for all heads, v 8x32 {cached}; " in str(block)
    assert "cache concat" in str(block)
    (joined,) = block.streams["k"]
    latent, rotary = joined.parts
    assert [type(step) for step in rotary.steps] == [Projection, Rotary, CacheUpdate]
    kept = [latent.steps[0].down_cache, rotary.steps[-1], block.v.down_cache]
    assert all(c.past.value in host.graph.inputs and c.present in host.graph.outputs for c in kept)
    assert kept[0].past.value is kept[2].past.value is not kept[1].past.value
    read, wanted = host.tap([latent.steps[0].input, site.k.value], host.example_inputs())
    again = computed(latent.steps[0], read.reshape(2, -1, LATENT), None, None, None)
    torch.testing.assert_close(again, as_rows(site.k, wanted, site.axes)[..., :NOPE], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="this block caches latents"):
        rows(block, "k", torch.zeros(2, 3, 32))


def test_through_onnx():
    """The exporter writes the two parts into a tensor by their numbers."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        named = block_models.inputs("llama")
        proto = torch.onnx.export(build("deepseek_v3"), (), kwargs=named, dynamo=True, verbose=False).model_proto
    host = OnnxHost.from_model(proto)
    _, block = found_in(host)
    start = f"rms_norm -> q 12x48 of low rank (32x12), {K}, {V}; rotary 4 from 8 half base 10000"
    assert str(block) == f"{start}; o 32x32; residual"


def test_parts_are_reported():
    found = attnopt.inspect(build("deepseek_v3"), block_models.inputs("llama"))
    block = json.loads(json.dumps(found.to_json()))["sites"][0]["block"]
    assert block["k"] is None
    latent, rotary = block["k_parts"]
    assert (latent["first"], latent["width"], latent["in"]) == (0, NOPE, LATENT)
    assert (rotary["first"], rotary["width"], rotary["in"]) == (NOPE, ROPE, 32)
    assert latent["down"]["weight"] == rotary["weight"]
    assert latent["down_norm"]["kind"] == "rms"
    assert "q_parts" not in block


def joined_block(spell):
    """Keys that `spell` makes of two layers [B, L, 32] each."""
    r = Recorder()
    x = r.input("x", B, L, 32)

    def heads(v, width=8):
        return r.permute(r.reshape(v, B, L, 4, width), 0, 2, 1, 3)

    k = spell(r, heads(r.linear(x, 16), 4), heads(r.linear(x, 16), 4))
    out = r.matmul(r.softmax(r.matmul(heads(r.linear(x, 32)), r.permute(k, 0, 1, 3, 2))), heads(r.linear(x, 32)))
    r.output(r.linear(r.reshape(r.permute(out, 0, 2, 1, 3), B, L, 32), 32))
    (site,) = recognise(r.graph).sites
    return find_block(r.graph, site)


def behind(r, a, b):
    return r.node("concat", b, a, shape=(B, 4, L, 8), axis=3)


def zipped(r, a, b):
    pairs = [r.reshape(v, B, 4, L, 4, 1) for v in (a, b)]
    return r.reshape(r.node("concat", *pairs, shape=(B, 4, L, 4, 2), axis=4), B, 4, L, 8)


def added(r, a, b):
    both = [r.node("concat", v, v, shape=(B, 4, L, 8), axis=3) for v in (a, b)]
    return r.binary("add", *both)


def test_neighbouring_channels_are_parts():
    block = joined_block(behind)
    (joined,) = block.streams["k"]
    assert isinstance(joined, Joined)
    assert [(part.first, part.width) for part in joined.parts] == [(0, 4), (4, 4)]
    assert "k 32x16 + 32x16, " in str(block)


@pytest.mark.parametrize("spell", [zipped, added])
def test_channels_that_are_mixed_are_no_parts(spell):
    block = joined_block(spell)
    assert block.k is None and block.projections("k") == ()
    assert block.missing[0].reason.startswith("projection of keys not found: its channels come from 2 values")
