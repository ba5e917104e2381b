"""Tiny decoders that keep a cache of fixed size in their buffers, by the recipe of transformers (executorch)."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from hf_models import VOCABULARY
from torch import Tensor, nn
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

PLACES = 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def decoder(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(attn_implementation="sdpa", **SIZES)).eval()
    config = transformers.Gemma2Config(attn_implementation="eager", sliding_window=6, **SIZES)
    return transformers.Gemma2ForCausalLM(config).eval()


def with_cache(family: str, batch: int = 1) -> nn.Module:
    model = decoder(family)
    model.generation_config = transformers.GenerationConfig(use_cache=True, cache_implementation="static")
    return TorchExportableModuleWithStaticCache(model, batch_size=batch, max_cache_len=PLACES, device="cpu").eval()


def step(position: int, batch: int = 1, count: int = 1) -> dict[str, Tensor]:
    """The tokens from this position on."""
    ids = torch.randint(2, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(position))
    return {"input_ids": ids, "cache_position": torch.arange(position, position + count)}


def texts(*calls: Any, steps: int = 10, batch: int = 1) -> list[Tensor]:
    """What each gives for the same text token by token: [steps, batch, vocabulary]."""
    with torch.no_grad():
        return [torch.stack([call(**step(at, batch))[:, -1] for at in range(steps)]) for call in calls]
