"""One model type, made tiny, with inputs on which it runs.

"llama", "eager"   ->   Subject(LlamaModel of two layers, {"input_ids": …, "attention_mask": …})
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from zoo.examples import Inputs, example_inputs, runs
from zoo.shrink import small_config
from zoo.small import Small
from zoo.small_configs import SMALL

MOST_PARAMETERS = 120_000_000
TYPES: tuple[str, ...] = tuple(sorted({*MODEL_MAPPING_NAMES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}))


class TooLarge(Exception):
    """The shrunk model is still too large to be run beside others."""


@dataclass(frozen=True)
class Subject:
    model_type: str
    attention: str
    model: nn.Module
    inputs: Inputs


def subject(model_type: str, attention: str) -> Subject:
    """Raises whatever the library raises: a type that cannot be made is listed with its error."""
    try:
        return built(model_type, attention, derive=True)
    except Exception as first:
        try:
            return built(model_type, attention, derive=False)
        except Exception:
            raise first from None


def built(model_type: str, attention: str, *, derive: bool) -> Subject:
    small = SMALL.get(model_type, Small())
    config = small_config(model_type, small.changes, derive=derive)
    mapping = AutoModel if model_type in MODEL_MAPPING_NAMES else AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(p.numel() for p in mapping.from_config(deepcopy(config), attn_implementation=attention).parameters())
    if size > MOST_PARAMETERS:
        raise TooLarge(f"{size / 1e6:.0f} million parameters after shrinking")
    torch.manual_seed(0)
    model = mapping.from_config(config, attn_implementation=attention).eval()
    if small.part is not None:
        model = small.part(model).eval()
    if small.inputs is not None:
        inputs = small.inputs(config)
        runs(model, inputs)
        return Subject(model_type, attention, model, inputs)
    return Subject(model_type, attention, model, example_inputs(model, config))
