"""The models that `generate.py` measures: the trained one of examples/, and random weights in the shapes of four families.

About 100 M parameters each: 12 layers of 768, 12 heads on 4, and a vocabulary of 8,192.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from trained_models import FOLDER

NAMES = ("code-lm", "llama", "qwen3", "mistral", "gemma2")
SHAPE = {
    "vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 8192, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def subject(name: str, attention: str = "sdpa", small: bool = False) -> Any:
    """The model of a name, float32, in evaluation mode; equal names give equal weights. small: 2 layers of 128, to try the script."""
    torch.manual_seed(0)
    if name == "code-lm":
        transformers.utils.logging.disable_progress_bar()
        return transformers.LlamaForCausalLM.from_pretrained(
            FOLDER / "code-lm", dtype=torch.float32, attn_implementation=attention
        ).eval()
    given = {**SHAPE, **(SMALL if small else {}), "attn_implementation": attention}
    kinds: dict[str, tuple[Any, Any]] = {
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
        "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config),
        "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig),
        "gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config),
    }
    kind, config = kinds[name]
    if name in ("mistral", "gemma2"):
        given["sliding_window"] = 512
    if name == "gemma2":
        given |= {"query_pre_attn_scalar": 64, "attn_implementation": "eager"}  # the only one that knows its soft caps
    return kind(config(**given)).eval()


def longest(name: str) -> int:
    """Tokens of a prompt that leave room for 128 more."""
    return 1024 - 128 if name == "code-lm" else 4096


def batches(name: str, count: int = 5, rows: int = 8, length: int = 128) -> list[torch.Tensor]:
    """Calibration tokens: held-out source for the trained model, random ones for the others."""
    if name == "code-lm":
        from trained_models import code_windows

        return list(code_windows(count * rows, length).split(rows))
    random = torch.Generator().manual_seed(1)
    return [torch.randint(3, SHAPE["vocab_size"], (rows, length), generator=random) for _ in range(count)]
