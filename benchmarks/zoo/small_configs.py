"""What generic shrinking loses, as data: fields of a configuration that it must not decide, and inputs that no name tells.

    "swin": Small({"image_size": 32, "depths": (2, 2), …})      "perceiver": Small(inputs=…)

Fields of inner configurations are written with a dot: "text_config.hidden_size".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import HGNetV2Config, ResNetConfig, SwinConfig

from zoo.examples import BATCH, LENGTH, Inputs, padding_mask, pixels, words
from zoo.parts import WindowedLayer, with_answers, with_dense_experts


@dataclass(frozen=True)
class Small:
    """part: what is measured in place of the whole model, where only that can be traced."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[Any], Inputs] | None = None
    part: Callable[[Any], nn.Module] | None = None


def resnet(*stages: str) -> ResNetConfig:
    return ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic", out_features=list(stages)
    )


HGNET = {
    "stem_channels": [3, 16, 16], "stage_in_channels": [16, 16, 32, 64], "stage_mid_channels": [16, 16, 16, 16],
    "stage_out_channels": [16, 32, 64, 128], "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2],
    "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1],
}  # fmt: skip


def hgnet(*stages: str) -> HGNetV2Config:
    return HGNetV2Config(**HGNET, out_features=list(stages))


def swin_backbone() -> SwinConfig:
    """Four stages of 16, 8, 4 and 2 patches a side; windows fit into the smallest."""
    return SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[2, 2, 1, 1], num_heads=[1, 2, 4, 8], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip


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


def image_of_patches(config: Any) -> Inputs:
    """Two images of 4 x 4 patches, each patch an image of its own."""
    size = config.patch_size
    return {"pixel_values": torch.randn(2 * 16, 3, size, size), "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}


def row_of_patches(config: Any) -> Inputs:
    """One image of 4 x 4 and one of 4 x 2 patches, side by side."""
    return {
        "pixel_values": torch.randn(1, 3, config.patch_size, 24 * config.patch_size),
        "target_sizes": torch.tensor([[4, 4], [4, 2]], dtype=torch.int32),
    }


def windowed(config: Any) -> Inputs:
    """Hidden states of whole windows, and the additive mask of their padding."""
    length = 4 * config.attention_window[0] if isinstance(config.attention_window, (list, tuple)) else 4 * config.attention_window
    mask = (1.0 - padding_mask(length, torch.float32)) * -10000.0
    return {"hidden_states": torch.randn(BATCH, length, config.hidden_size), "attention_mask": mask}


def wave(channels: int = 1, samples: int = 2000) -> Callable[[Any], Inputs]:
    return lambda config: {"input_values": torch.randn(BATCH, channels, samples)}


def wide_image(config: Any) -> Inputs:
    """Six places where the backbone ends, and padding in one of two images."""
    mask = torch.ones(BATCH, 64, 96, dtype=torch.long)
    mask[1, :, 64:] = 0
    return {"pixel_values": torch.randn(BATCH, 3, 64, 96), "pixel_mask": mask}


def text_alone(config: Any) -> Inputs:
    return {"input_ids": words(LENGTH), "attention_mask": padding_mask(LENGTH), "use_cache": False}


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
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1}
MROPE = {"rope_parameters": three_axes(2, 3, 3)}

SMALL: dict[str, Small] = {
    **dict.fromkeys(("conditional_detr", "dab-detr", "detr", "table-transformer"), Small(C5, wide_image)),
    "dbrx": Small({"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0}, part=with_dense_experts),
    "deformable_detr": Small(C345),
    "donut-swin": Small(SWIN),
    "maskformer-swin": Small(SWIN),
    "swin": Small(SWIN),
    "swinv2": Small(SWIN),
    "bamba": Small({**MAMBA, "attn_layer_indices": [1]}),
    "chameleon": Small({"vocabulary_map": {"<image>": 20}}),
    "cvt": Small({"embed_dim": (16, 32, 64), "num_heads": (1, 2, 4), "depth": (1, 1, 2)}),
    "decision_transformer": Small(
        {},
        lambda c: {
            "states": torch.randn(BATCH, 5, c.state_dim), "actions": torch.randn(BATCH, 5, c.act_dim),
            "returns_to_go": torch.randn(BATCH, 5, 1), "timesteps": torch.arange(5).expand(BATCH, 5).clone(),
            "attention_mask": torch.ones(BATCH, 5, dtype=torch.long),
        },
    ),
    "deepseek_v2": Small({"num_experts_per_tok": 2}),
    "dots1": Small({"n_routed_experts": 4}),
    "emu3": Small({"vocabulary_map": {"<image>": 20}}),
    "esm": Small({"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}),
    "falcon_h1": Small({**MAMBA, "mamba_d_ssm": 128}),
    "funnel": Small({"architectures": ["FunnelModel"], "block_sizes": (1, 1), "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 64}),
    "granitemoehybrid": Small({**MAMBA, "layer_types": ["mamba", "attention"], "num_hidden_layers": 2}),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral", "nemotron"), Small({"head_dim": 16})),
    "hunyuan_vl": Small({"text_config.head_dim": 16}),
    "led": Small({"attention_window": 6}, windowed, lambda m: WindowedLayer(m.encoder.layers[0].self_attn.longformer_self_attn)),
    "longformer": Small({"attention_window": 6}, windowed, lambda m: WindowedLayer(m.encoder.layer[0].attention.self)),
    "levit": Small(
        {"image_size": 64, "patch_size": 16, "hidden_sizes": (32, 48, 64), "num_attention_heads": (2, 3, 4), "depths": (1, 1, 1)}
    ),
    "lfm2_moe": Small({"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}),
    "lilt": Small({"hidden_size": 96, "intermediate_size": 96}),
    "mamba2": Small({"num_heads": 8, "head_dim": 16, "n_groups": 1}),
    **dict.fromkeys(("mask2former", "maskformer", "oneformer"), Small({"backbone_config": swin_backbone()})),
    "grounding-dino": Small({"num_queries": 2}),
    "mm-grounding-dino": Small({"num_queries": 2}),
    "nemotron_h": Small({"layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1}),
    "sam_hq": Small(
        {"vision_config.output_channels": 64, "vision_config.num_pos_feats": 32, "vision_config.window_size": 2,
         "vision_config.global_attn_indexes": (1,), "prompt_encoder_config.hidden_size": 64, "mask_decoder_config.vit_dim": 64},
        lambda c: {"pixel_values": pixels(c), "input_points": torch.rand(BATCH, 1, 2, 2) * 32},
    ),
    "seggpt": Small(
        {"image_size": (64, 32)},
        lambda c: {"pixel_values": torch.randn(BATCH, 3, 32, 32), "prompt_pixel_values": torch.randn(BATCH, 3, 32, 32),
                   "prompt_masks": torch.randn(BATCH, 3, 32, 32)},
    ),
    "speecht5": Small(
        {},
        lambda c: {"input_values": torch.randn(BATCH, LENGTH, c.hidden_size), "decoder_input_values": torch.randn(BATCH, 7, c.hidden_size),
                   "attention_mask": padding_mask(LENGTH)},
    ),
    "timesfm": Small(
        {},
        lambda c: {"past_values": torch.randn(BATCH, 64), "past_values_padding": torch.zeros(BATCH, 64, dtype=torch.long),
                   "freq": torch.zeros(BATCH, 1, dtype=torch.long)},
    ),
    "vit_mae": Small({}, lambda c: {"pixel_values": pixels(c), "noise": torch.rand(BATCH, (c.image_size // c.patch_size) ** 2)}),
    "vjepa2": Small({"crop_size": 32, "patch_size": 8, "frames_per_clip": 4}),
    "siglip2_vision_model": Small(
        {"num_patches": 16},
        lambda c: {"pixel_values": torch.randn(BATCH, 16, 3 * c.patch_size**2),
                   "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
                   "spatial_shapes": torch.tensor([[4, 4], [4, 4]])},
    ),
    "xlnet": Small({"d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 64}),
    "zamba": Small({"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4}),
    "gemma3": Small({}, text_alone),  # with token_type_ids torch.export records the inside of a vmap
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
        ("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl"),
        Small({"text_config.rope_parameters": three_axes(2, 3, 3)}),
    ),
    "glm4v_moe": Small({"text_config.rope_parameters": {**three_axes(1, 1, 2), "partial_rotary_factor": 0.5}}),
    "glm4v_moe_text": Small({"rope_parameters": {**three_axes(1, 1, 2), "partial_rotary_factor": 0.5}}),
    "rt_detr": Small({"encoder_in_channels": [64, 128, 256], "decoder_in_channels": [64, 64, 64]}),
    "rt_detr_v2": Small({"encoder_in_channels": [64, 128, 256], "decoder_in_channels": [64, 64, 64]}),
    "kosmos-2": Small(
        {"latent_query_num": 8},
        lambda c: {"input_ids": words(LENGTH), "attention_mask": padding_mask(LENGTH), "pixel_values": pixels(c.vision_config),
                   "image_embeds_position_mask": (torch.arange(LENGTH) < c.latent_query_num).expand(BATCH, LENGTH)},
    ),
    "align": Small({"projection_dim": 640}),
    "bit": Small({"num_groups": 8}),
    "efficientnet": Small({"hidden_dim": 2560}),
    "hgnet_v2": Small(HGNET),
    **dict.fromkeys(
        ("d_fine", "deimv2"),
        Small(
            {"backbone_config": hgnet("stage2", "stage3", "stage4"), "encoder_in_channels": (32, 64, 128),
             "decoder_in_channels": (64, 64, 64)}
        ),
    ),
    "kimi_k25_vision": Small({}, image_of_patches, with_answers),
    **dict.fromkeys(("minicpm_ocr_vision", "minicpmv4_7_vision"), Small({"insert_layer_id": 0}, row_of_patches, with_answers)),
    "inkling2_vision": Small(
        {},
        lambda c: {"pixel_values": torch.randn(8, 2 * c.patch_size, 2 * c.patch_size, 3),
                   "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]])},
        with_answers,
    ),
    "gemma4_vision": Small(
        {"pooling_kernel_size": 2},
        lambda c: {"pixel_values": torch.randn(BATCH, 16, 3 * c.patch_size**2),
                   "pixel_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(BATCH, 16, 2)},
    ),
    **dict.fromkeys(
        ("cosmos3_edge_vision", "glm_image_vision", "hunyuan_vl_vision", "lfm3_vl_vision"),
        Small({}, patches_with_grid("pixel_values"), with_answers),
    ),
    "video_llama_3_vision": Small(
        {}, lambda c: {**patches_with_grid("pixel_values")(c), "merge_sizes": torch.tensor([2, 2])}, with_answers
    ),
    "qwen2_5_vl_vision": Small({"window_size": 32}, patches_with_grid(), with_answers),
    "exaone4_5_vision": Small({"window_size": 32}, patches_with_grid(), with_answers),
    **dict.fromkeys(
        ("cohere_compass_vision", "glm5_next_vision", "qwen3_5_moe_vision", "qwen3_vl_moe_vision", "qwen3_vl_vision", "qwen4_exp_vision"),
        Small({}, patches_with_grid(), with_answers),
    ),
    **dict.fromkeys(
        ("glm4v_moe_vision", "glm4v_vision", "qwen3_5_vision", "glm_ocr_vision"),
        Small({}, patches_with_grid(), with_answers),
    ),
}  # fmt: skip
