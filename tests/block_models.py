"""Tiny random models whose blocks differ, what their first block is called, and its weights as the model's own modules hold them.

FAMILIES["phi3"].text      the line that the block prints
FAMILIES["phi3"].weights   attention module -> {"q": [out, in], …}, cut by the rules of the model's own code
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import hf_models  # noqa: F401  # offline, before transformers is loaded
import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 99
SHARED: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
PLAIN = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, **SHARED}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
LAYERED = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
           "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, **SHARED}  # fmt: skip
TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 512}

Weights = Callable[[nn.Module], Mapping[str, Tensor]]


def separate(q: str = "q_proj", k: str = "k_proj", v: str = "v_proj") -> Weights:
    return lambda attention: {n: attention.get_submodule(p).weight for n, p in (("q", q), ("k", k), ("v", v))}


def halves(attention: nn.Module) -> dict[str, Tensor]:
    """Phi-3: all queries, all keys, all values."""
    q, k, v = attention.qkv_proj.weight.split([32, 16, 16])
    return {"q": q, "k": k, "v": v}


def conv1d(attention: nn.Module) -> dict[str, Tensor]:
    q, k, v = attention.c_attn.weight.T.split(32)
    return {"q": q, "k": k, "v": v}


def by_head(attention: nn.Module) -> dict[str, Tensor]:
    """BLOOM, GPT-NeoX: query, key, value of head 0, then of head 1, …"""
    apart = attention.query_key_value.weight.view(4, 3, 8, 32)
    return {name: apart[:, i].reshape(32, 32) for i, name in enumerate("qkv")}


def multi_query(attention: nn.Module) -> dict[str, Tensor]:
    q, k, v = attention.query_key_value.weight.split([32, 8, 8])
    return {"q": q, "k": k, "v": v}


def by_group(attention: nn.Module) -> dict[str, Tensor]:
    """Falcon's newer form: two queries, a key, a value of group 0, then of group 1; keys are repeated before they turn."""
    apart = attention.query_key_value.weight.view(2, 4, 8, 32)
    return {
        "q": apart[:, :2].reshape(32, 32),
        **{n: apart[:, i].repeat_interleave(2, 0).reshape(32, 32) for n, i in (("k", 2), ("v", 3))},
    }


@dataclass(frozen=True)
class Family:
    """How to build a model, where its first attention is, and what its block is."""

    build: Callable[[str], nn.Module]
    attention: str
    text: str
    weights: Weights = separate()
    o: str = "o_proj"
    inv_freq: str = ""  # the buffer that holds the frequencies
    decoder: bool = False


def text_model(kind: str, config: str, sizes: Mapping[str, Any], **options: Any) -> Callable[[str], nn.Module]:
    def build(attention: str) -> nn.Module:
        made = getattr(transformers, config)(**{**sizes, **options}, attn_implementation=attention)
        return getattr(transformers, kind)(made)

    return build


def causal(name: str, **options: Any) -> Callable[[str], nn.Module]:
    return text_model(f"{name}ForCausalLM", f"{name}Config", GROUPED, **options)


SEPARATE = "q 32x32, k 32x16, v 32x16"
LLAMA = f"rms_norm -> {SEPARATE}; rotary 8 half base 10000; o 32x32; residual"
LAYER, ROPE = "model.layers.0.self_attn", "model.rotary_emb.inv_freq"
FAMILIES: dict[str, Family] = {
    "bert": Family(
        text_model("BertModel", "BertConfig", PLAIN), "encoder.layer.0.attention.self",
        "q 32x32, k 32x32, v 32x32 bias; o 32x32 bias; residual; then layer_norm",
        separate("query", "key", "value"), "../output.dense",
    ),
    "gpt2": Family(
        text_model("GPT2LMHeadModel", "GPT2Config", SHARED, n_embd=32, n_layer=1, n_head=4), "transformer.h.0.attn",
        "layer_norm -> q 32x32, k 32x32, v 32x32 (packed 32x96) bias; o 32x32 bias; residual", conv1d, "c_proj",
    ),
    "llama": Family(causal("Llama"), LAYER, LLAMA, inv_freq=ROPE),
    "llama_yarn": Family(
        causal("Llama", attention_bias=True, rope_scaling=YARN), LAYER,
        f"rms_norm -> {SEPARATE} bias; rotary 8 half own inv_freq scaling 1.138629; o 32x32 bias; residual", inv_freq=ROPE,
    ),
    "mistral": Family(causal("Mistral", sliding_window=6), LAYER, LLAMA, inv_freq=ROPE),
    "qwen3": Family(
        causal("Qwen3", head_dim=8), LAYER,
        f"rms_norm -> {SEPARATE}; q/k rms_norm per head; rotary 8 half base 10000; o 32x32; residual", inv_freq=ROPE,
    ),
    "olmo2": Family(
        causal("Olmo2"), LAYER,
        f"{SEPARATE}; q/k rms_norm over all heads; rotary 8 half base 10000; o 32x32; o rms_norm; residual", inv_freq=ROPE,
    ),
    "phi3": Family(
        causal("Phi3"), LAYER, f"rms_norm -> {SEPARATE} (packed 32x64); rotary 8 half base 10000; o 32x32; residual",
        halves, inv_freq=ROPE,
    ),
    "falcon": Family(
        text_model("FalconForCausalLM", "FalconConfig", PLAIN, multi_query=True, parallel_attn=True),
        "transformer.h.0.self_attention",
        "layer_norm -> q 32x32, k 32x8, v 32x8 (packed 32x48); rotary 8 half base 10000; o 32x32; parallel residual",
        multi_query, "dense", "transformer.rotary_emb.inv_freq",
    ),
    "falcon_groups": Family(
        text_model("FalconForCausalLM", "FalconConfig", PLAIN, num_kv_heads=2, new_decoder_architecture=True),
        "transformer.h.0.self_attention",
        "layer_norm -> q 32x32, k 32x16, v 32x16 (packed 32x64, interleaved); rotary 8 half base 10000; o 32x32; parallel residual",
        by_group, "dense", "transformer.rotary_emb.inv_freq",
    ),
    "bloom": Family(
        text_model("BloomForCausalLM", "BloomConfig", SHARED, hidden_size=32, n_layer=1, n_head=4),
        "transformer.h.0.self_attention",
        "layer_norm -> q 32x32, k 32x32, v 32x32 (packed 32x96, interleaved) bias; o 32x32 bias; residual", by_head, "dense",
    ),
    "gptj": Family(
        text_model("GPTJForCausalLM", "GPTJConfig", SHARED, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=64),
        "transformer.h.0.attn",
        "layer_norm -> q 32x32, k 32x32, v 32x32; rotary 4 interleaved base 10000; o 32x32; parallel residual", o="out_proj",
    ),
    "gpt_neox": Family(
        text_model("GPTNeoXForCausalLM", "GPTNeoXConfig", PLAIN,
                   rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        "gpt_neox.layers.0.attention",
        "layer_norm -> q 32x32, k 32x32, v 32x32 (packed 32x96, interleaved) bias; rotary 4 half base 10000; o 32x32 bias; "
        "parallel residual", by_head, "dense", "gpt_neox.rotary_emb.inv_freq",
    ),
    "gemma2": Family(
        causal("Gemma2", head_dim=8, sliding_window=6), LAYER,
        f"rms_norm (1 + weight) -> {SEPARATE}; rotary 8 half base 10000; o 32x32; o rms_norm (1 + weight); residual", inv_freq=ROPE,
    ),
    "t5": Family(
        text_model("T5ForConditionalGeneration", "T5Config", SHARED, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
                   decoder_start_token_id=0),
        "decoder.block.0.layer.1.EncDecAttention",
        "rms_norm -> q 32x32, k 32x32, v 32x32 (k, v from another sequence); o 32x32; residual",
        separate("q", "k", "v"), "o", decoder=True,
    ),
    "bart": Family(
        text_model("BartForConditionalGeneration", "BartConfig", LAYERED, max_position_embeddings=64, decoder_start_token_id=1),
        "model.decoder.layers.0.encoder_attn",
        "q 32x32, k 32x32, v 32x32 (k, v from another sequence) bias; o 32x32 bias; residual; then layer_norm",
        o="out_proj", decoder=True,
    ),
    "vit": Family(
        text_model("ViTModel", "ViTConfig", TOWER, image_size=16, patch_size=4), "layers.0.attention",
        "layer_norm -> q 32x32, k 32x32, v 32x32 bias; o 32x32 bias; residual",
    ),
    "clip": Family(
        text_model("CLIPTextModel", "CLIPTextConfig", PLAIN, max_position_embeddings=64), "encoder.layers.0.self_attn",
        "layer_norm -> q 32x32, k 32x32, v 32x32 bias; o 32x32 bias; residual", o="out_proj",
    ),
    "whisper": Family(
        text_model("WhisperForConditionalGeneration", "WhisperConfig", LAYERED, max_source_positions=24, max_target_positions=32,
                   num_mel_bins=8, decoder_start_token_id=1),
        "model.decoder.layers.0.self_attn",
        "layer_norm -> q 32x32, k 32x32, v 32x32 bias on q, v; o 32x32 bias; residual", o="out_proj", decoder=True,
    ),
    "cohere2": Family(
        causal("Cohere2", head_dim=8, sliding_window=6), LAYER,
        f"layer_norm -> {SEPARATE}; rotary 8 interleaved base 10000; o 32x32; parallel residual", inv_freq=ROPE,
    ),
    "glm4": Family(
        causal("Glm4", head_dim=8), LAYER,
        f"rms_norm -> {SEPARATE} bias; rotary 4 interleaved base 10000; o 32x32; o rms_norm; residual", inv_freq=ROPE,
    ),
}  # fmt: skip


def build(family: str, attention: str = "eager") -> nn.Module:
    """A model in evaluation mode; norms and biases are not trivial, and weights large enough for errors to show."""
    torch.manual_seed(0)
    model = FAMILIES[family].build(attention).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def inputs(family: str) -> dict[str, Any]:
    ids = torch.arange(24).reshape(2, 12) % VOCABULARY
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1:, -3:] = 0
    made: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if family == "whisper":
        made = {"input_features": torch.randn(2, 8, 48)}
    if FAMILIES[family].decoder:
        made["decoder_input_ids"] = ids[:, :7]
    if family not in ("bert", "clip"):
        made["use_cache"] = False
    return made


def attention_module(family: str, model: nn.Module) -> nn.Module:
    return model.get_submodule(FAMILIES[family].attention)


def output_weight(family: str, model: nn.Module) -> Tensor:
    """The weight of the output projection [out, in]; a path that starts with ../ is beside the attention."""
    path = FAMILIES[family].o
    if path.startswith("../"):
        return model.get_submodule(f"{FAMILIES[family].attention.rpartition('.')[0]}.{path[3:]}").weight
    layer = attention_module(family, model).get_submodule(path)
    return layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
