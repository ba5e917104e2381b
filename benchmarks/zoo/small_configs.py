"""What generic shrinking loses, as data: fields of a configuration that it must not decide, and inputs that no name tells.

    "swin": Small({"image_size": 32, "depths": (2, 2), …})      "perceiver": Small(inputs=…)

Fields of inner configurations are written with a dot: "text_config.hidden_size".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import ResNetConfig

from zoo.examples import BATCH, LENGTH, Inputs, padding_mask, pixels, words


@dataclass(frozen=True)
class Small:
    changes: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[Any], Inputs] | None = None


def resnet(*stages: str) -> ResNetConfig:
    return ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic", out_features=list(stages)
    )


def series(config: Any) -> Inputs:
    past, future = config.context_length + max(config.lags_sequence), config.prediction_length
    return {
        "past_values": torch.randn(BATCH, past),
        "past_time_features": torch.randn(BATCH, past, config.num_time_features),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": torch.randn(BATCH, future),
        "future_time_features": torch.randn(BATCH, future, config.num_time_features),
    }


def patches_with_grid(name: str = "hidden_states") -> Callable[[Any], Inputs]:
    """Two images of 4 x 4 patches, already cut up."""

    def made(config: Any) -> Inputs:
        patch, channels = config.patch_size, getattr(config, "in_channels", getattr(config, "num_channels", 3))
        volume = channels * getattr(config, "temporal_patch_size", 1) * patch * patch
        return {name: torch.randn(2 * 16, volume), "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}

    return made


def wave(channels: int = 1, samples: int = 2000) -> Callable[[Any], Inputs]:
    return lambda config: {"input_values": torch.randn(BATCH, channels, samples)}


def three_axes(*sections: int, key: str = "mrope_section") -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, key: list(sections)}


SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
SERIES = {
    "prediction_length": 4,
    "context_length": 16,
    "num_time_features": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "d_model": 32,
}
C5 = {"backbone_config": resnet("stage4"), "use_timm_backbone": False, "use_pretrained_backbone": False}
C345 = {**C5, "backbone_config": resnet("stage2", "stage3", "stage4")}
MROPE = {"rope_parameters": three_axes(2, 3, 3)}

SMALL: dict[str, Small] = {
    "conditional_detr": Small(C5),
    "dab-detr": Small(C5),
    "dbrx": Small({"attn_config.rope_theta": 10000.0}),
    "deformable_detr": Small(C345),
    "detr": Small(C5),
    "table-transformer": Small(C5),
    "donut-swin": Small(SWIN),
    "maskformer-swin": Small(SWIN),
    "swin": Small(SWIN),
    "swinv2": Small(SWIN),
    "gpt_neo": Small({"attention_types": [[["global", "local"], 1]], "num_layers": 2}),
    "autoformer": Small(SERIES, series),
    "informer": Small(SERIES, series),
    "time_series_transformer": Small(SERIES, series),
    "perceiver": Small(
        {"d_model": 64, "d_latents": 64, "num_self_attends_per_block": 2, "num_latents": 8},
        lambda c: {"inputs": torch.randn(BATCH, LENGTH, c.d_model), "attention_mask": padding_mask(LENGTH)},
    ),
    "sam": Small(
        {"vision_config.output_channels": 64, "vision_config.num_pos_feats": 32, "vision_config.window_size": 2,
         "vision_config.global_attn_indexes": (1,), "prompt_encoder_config.hidden_size": 64},
        lambda c: {"pixel_values": pixels(c), "input_points": torch.rand(BATCH, 1, 2, 2) * 32},
    ),
    "mimi": Small({}, wave()),
    "xcodec": Small({}, wave()),
    "xmod": Small({"default_language": "en_XX"}),
    "glm4v_text": Small(MROPE),
    "glm_image_text": Small(MROPE),
    "glm_ocr_text": Small(MROPE),
    "qwen2_5_vl_text": Small(MROPE),
    "qwen2_vl_text": Small(MROPE),
    "lxmert": Small(
        {},
        lambda c: {"input_ids": words(LENGTH), "attention_mask": padding_mask(LENGTH),
                   "visual_feats": torch.randn(BATCH, 5, c.visual_feat_dim), "visual_pos": torch.rand(BATCH, 5, 4)},
    ),
    **dict.fromkeys(
        ("glm4v_moe_vision", "glm4v_vision", "qwen2_5_vl_vision", "qwen3_5_vision", "qwen3_vl_vision", "glm_ocr_vision"),
        Small({}, patches_with_grid()),
    ),
}  # fmt: skip
