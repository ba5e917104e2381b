"""Tiny random Hugging Face models of the families that tests and exports share, with padded inputs."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn

FAMILIES = ("bert", "gpt2", "llama", "mistral", "t5")
ATTENTIONS = {"bert": 2, "gpt2": 2, "llama": 2, "mistral": 2, "t5": 6}
CASES = [(family, attention) for family in FAMILIES for attention in ("eager", "sdpa")]
VOCABULARY = 99


def build(family: str, attention: str = "eager", layers: int = 2) -> nn.Module:
    """A model in evaluation mode; equal arguments give equal weights."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {"vocab_size": VOCABULARY, "attn_implementation": attention, "bos_token_id": 0, "eos_token_id": 1}
    decoder = {
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    }
    if family == "bert":
        config = transformers.BertConfig(
            hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64, **shared
        )
        return transformers.BertModel(config).eval()
    if family == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=layers, n_head=4, **shared)).eval()
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**decoder, **shared)).eval()
    if family == "mistral":
        return transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=6, **decoder, **shared)).eval()
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=layers, num_heads=4, decoder_start_token_id=0,
        attn_implementation=attention,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def inputs(family: str, padding: str = "right", batch: int = 2, length: int = 12, decoder_length: int = 7) -> dict[str, Any]:
    """Keyword inputs. Row 1 has three padding tokens on the given side ("left", "right" or "none")."""
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(batch, length, dtype=torch.long)
    if padding == "left":
        mask[1:, :3] = 0
    elif padding == "right":
        mask[1:, -3:] = 0
    made: dict[str, Any] = {
        "input_ids": torch.randint(0, VOCABULARY, (batch, length), generator=generator),
        "attention_mask": mask,
    }
    if family == "t5":
        made["decoder_input_ids"] = torch.randint(0, VOCABULARY, (batch, decoder_length), generator=generator)
    if family != "bert":
        made["use_cache"] = False
    return made


def visible_rows(family: str, named: dict[str, Any], output: Tensor) -> Tensor:
    """The rows [batch, length] of a token-wise output that have a visible key; others may differ between kernels."""
    mask = named["attention_mask"].bool()
    if family in ("gpt2", "llama", "mistral"):
        return mask.cumsum(1).bool()  # causal: from the first real token on
    return torch.ones(output.shape[:2], dtype=torch.bool)
