"""Tiny random language models of transformers that generate, wide enough that weights are worth storing in codes."""

from __future__ import annotations

import os
from functools import lru_cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor

from attnopt.hosts.module.host import ModuleHost

SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
COMMON = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def language_model(family: str, attention: str = "sdpa", layers: int = 2):
    """llama, qwen3, mistral (windows of 6), gemma2 (a window in every other layer, soft caps) or gpt2, with large weights."""
    torch.manual_seed(0)
    given = {**COMMON, "attn_implementation": attention}
    narrow = {"head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2, **SIZE, "num_hidden_layers": layers}
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **given)
        return transformers.GPT2LMHeadModel(config).eval()
    if family == "gemma2":
        given["attn_implementation"] = "eager"  # the only one that knows soft caps
        config = transformers.Gemma2Config(sliding_window=6, query_pre_attn_scalar=16, **narrow, **given)
        return transformers.Gemma2ForCausalLM(config).eval()
    kinds = {
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**narrow, **given)),
        "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**narrow, **given)),
        "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig(sliding_window=6, **narrow, **given)),
    }
    kind, config = kinds[family]
    return kind(config).eval()


def tokens(rows: int = 2, length: int = 12, padded: int = 0) -> dict[str, Tensor]:
    """input_ids and attention_mask; the first row has so many tokens of padding on its left."""
    ids = torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


@lru_cache(maxsize=8)
def host_of(family: str, attention: str = "sdpa") -> ModuleHost:
    """The model of a family in its host; tests share it and edit copies."""
    return ModuleHost.open(language_model(family, attention), {**tokens(), "use_cache": False})


def generated(model, given: dict[str, Tensor], count: int = 8, **options) -> Tensor:
    """Greedy tokens, as many as asked for."""
    return model.generate(**given, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, **options)
