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
from zoo.inputs import (
    image_of_patches,
    line_of_text,
    mel_first,
    mel_last,
    patches_with_grid,
    patches_with_sizes,
    row_of_patches,
    series,
    text_alone,
    text_with,
    wave,
    wave_and_mel,
    wide_image,
    windowed,
)
from zoo.parts import WindowedLayer, with_answers, with_dense_experts
from zoo.shrink import WINDOW


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
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
SAM2 = {
    "backbone_config.hidden_size": 16,
    "backbone_config.image_size": [64, 64],
    "backbone_channel_list": [128, 64, 32, 16],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}
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
    "deepseek_ocr2": Small(
        {"text_config.mlp_layer_types": ["dense", "sparse"], "text_config.num_experts_per_tok": 2, "text_config.n_group": 1,
         "text_config.topk_group": 1}
    ),
    "diffusion_gemma": Small(
        {"text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 64, "canvas_length": 8},
        lambda c: {"input_ids": words(LENGTH), "attention_mask": padding_mask(LENGTH), "decoder_input_ids": words(8)},
    ),
    "deepseek_v2": Small({"num_experts_per_tok": 2}),
    "emu3": Small({"vocabulary_map": {"<image>": 20}, "vq_config.base_channels": 32}),
    "inkling_mm_model": Small({"vision_config.num_hidden_layers": 8}),
    "esm": Small({"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}),
    "falcon_h1": Small({**MAMBA, "mamba_d_ssm": 128}),
    "funnel": Small({"architectures": ["FunnelModel"], "block_sizes": (1, 1), "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 64}),
    "granitemoehybrid": Small({**MAMBA, "layer_types": ["mamba", "attention"], "num_hidden_layers": 2}),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "nemotron"), Small({"head_dim": 16})),
    "led": Small({"attention_window": 6}, windowed, lambda m: WindowedLayer(m.encoder.layers[0].self_attn.longformer_self_attn)),
    "longformer": Small({"attention_window": 6}, windowed, lambda m: WindowedLayer(m.encoder.layer[0].attention.self)),
    "levit": Small(
        {"image_size": 64, "patch_size": 16, "hidden_sizes": (32, 48, 64), "num_attention_heads": (2, 3, 4), "depths": (1, 1, 1)}
    ),
    "lfm2_moe": Small({"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}),
    "lilt": Small({"hidden_size": 96, "intermediate_size": 96}),
    "mamba2": Small({"num_heads": 8, "head_dim": 16, "n_groups": 1}),
    **dict.fromkeys(("mask2former", "maskformer"), Small({"backbone_config": swin_backbone()})),
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
    "siglip2_vision_model": Small({"num_patches": 16}, patches_with_sizes),
    "xlnet": Small({"d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 64}),
    "zamba": Small({"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4}),
    "gemma3": Small({}, text_alone),  # with token_type_ids torch.export records the inside of a vmap
    "gpt_neo": Small({"attention_types": [[["global", "local"], 1]], "num_layers": 2}),
    "autoformer": Small({**SERIES, "label_length": 12}, series),
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
    "pegasus_x": Small({"block_size": 8, "num_global_tokens": 3}),
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
    "bark": Small({}, part=lambda m: m.semantic),
    **dict.fromkeys(("fsmt", "fastspeech2_conformer", "fastspeech2_conformer_with_hifigan"), Small({}, part=with_answers)),
    "encodec": Small({}, wave(), with_answers),
    "longcat_flash": Small({"zero_expert_num": 4}, part=with_answers),
    "blt": Small({}, part=with_answers),
    "dots1": Small({"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "hunyuan_vl_text": Small({"head_dim": 16, "rope_parameters": three_axes(2, 2, 2, 2)}),
    "hunyuan_vl": Small({"text_config.head_dim": 16, "text_config.rope_parameters": three_axes(2, 2, 2, 2)}),
    "ernie4_5_vl_moe": Small({"text_config.rope_parameters": three_axes(3, 3, 2)}),
    "glm_image": Small({"text_config.rope_parameters": three_axes(2, 3, 3)}),
    "nemo_speechlm": Small({"text_config.n_groups": 1, "text_config.mamba_num_heads": 8}),
    "idefics": Small(
        {},
        lambda c: {"input_ids": words(LENGTH), "attention_mask": padding_mask(LENGTH), "pixel_values": torch.randn(BATCH, 1, 3, 32, 32),
                   "image_attention_mask": torch.ones(BATCH, LENGTH, 1, dtype=torch.long), "use_cache": False},
    ),
    "blip-2": Small({"image_token_index": 20}, text_with(8, pixel_values=lambda c: pixels(c.vision_config))),
    "instructblip": Small(
        {"image_token_index": 20}, text_with(8, pixel_values=lambda c: pixels(c.vision_config), qformer_input_ids=lambda c: words(5))
    ),
    "instructblipvideo": Small(
        {"video_token_index": 20},
        text_with(32, pixel_values=lambda c: pixels(c.vision_config, 4), qformer_input_ids=lambda c: words(5)),
    ),
    "mimi": Small({"codebook_dim": 64}, wave()),
    "mimi_encoder": Small({}, wave()),
    "dac": Small({}, wave()),
    "pocket_tts_audio_tokenizer_encoder": Small({}, wave()),
    "mimi_decoder": Small({}, lambda c: {"latents": torch.randn(BATCH, c.hidden_size, LENGTH)}),
    "pocket_tts_audio_tokenizer_decoder": Small({}, lambda c: {"latents": torch.randn(BATCH, c.hidden_size, LENGTH)}),
    "audioflamingo3_encoder": Small({}, mel_first),
    "qwen3_asr_encoder": Small(
        {"n_window_infer": 200},
        lambda c: {"input_features": torch.randn(BATCH, c.num_mel_bins, 400),
                   "input_features_mask": torch.ones(BATCH, 400, dtype=torch.long)},
        with_answers,
    ),
    "fun_asr_nano_encoder": Small({}, lambda c: {"input_features": torch.randn(BATCH, 16, 560), "input_features_mask": padding_mask(16)}),
    "gemma3n_audio": Small({}, mel_last("audio_mel", "audio_mel_mask")),
    "gemma4_audio": Small({}, mel_last("input_features", "attention_mask", 64)),
    **dict.fromkeys(("granite_speech5_ctc", "granite_speech5_encoder"), Small({}, mel_last("input_features", "attention_mask", 320))),
    **dict.fromkeys(("granite_speech", "granite_speech_plus"), Small({"encoder_config.context_size": 16})),
    "granite4_vision": Small({"downsample_rate": "2/4", "deepstack_layer_map": [(-1, 0)], "spatial_target_layers": [1]}),
    **dict.fromkeys(("xcodec2", "neucodec"), Small({"quantization_dim": 128}, wave_and_mel)),
    "glm5_next_text": Small({"index_topk": 4, "index_kpool": 2}),
    "glm5_next": Small({"text_config.index_topk": 4, "text_config.index_kpool": 2}),
    "fun_asr_nano": Small({"adaptor_config.intermediate_size": 16}),
    "oneformer": Small(
        {"backbone_config": swin_backbone()},
        lambda c: {"pixel_values": torch.randn(BATCH, 3, 64, 64), "task_inputs": torch.randint(3, 100, (BATCH, c.task_seq_len))},
    ),
    "textnet": Small({"stem_out_channels": 16}),
    "timesfm2_5": Small(
        {}, lambda c: {"past_values": torch.randn(BATCH, 64), "past_values_padding": torch.zeros(BATCH, 64, dtype=torch.long)}
    ),
    "pi0": Small(
        {},
        text_with(16, pixel_values=lambda c: pixels(c.vlm_config.vision_config)[:, None],
                  pixel_attention_mask=lambda c: torch.ones(BATCH, 1, dtype=torch.bool),
                  action_embeds=lambda c: torch.randn(BATCH, 5, c.dit_config.hidden_size)),
    ),
    "vibevoice_acoustic_tokenizer": Small({"num_filters": 4}, wave(samples=6400)),
    "vibevoice_acoustic_tokenizer_decoder": Small({"num_filters": 4}, lambda c: {"hidden_states": torch.randn(BATCH, c.hidden_size, 4)}),
    "vibevoice_acoustic_tokenizer_encoder": Small({"num_filters": 4}, lambda c: {"hidden_states": torch.randn(BATCH, 1, 6400)}),
    "voxtral_realtime": Small(
        {}, lambda c: {"input_ids": words(LENGTH), "input_features": torch.randn(BATCH, c.audio_config.num_mel_bins, 8 * LENGTH)}
    ),
    "vibevoice": Small({"audio_config.num_filters": 4, "semantic_model_config.num_filters": 4}),
    "vibevoice_asr": Small(
        {"acoustic_tokenizer_chunk_size": 3200, "acoustic_tokenizer_encoder_config.num_filters": 4,
         "semantic_tokenizer_encoder_config.num_filters": 4}
    ),
    "step3p7": Small(
        {"text_config.sliding_window": WINDOW, "text_config.layer_types": ["sliding_attention", "full_attention"],
         "text_config.rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), ROPE)}
    ),
    "cohere_compass_text": Small(
        {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {"sliding_attention": ROPE, "full_attention": None}}
    ),
    "cohere_compass": Small(
        {"text_config.layer_types": ["sliding_attention", "full_attention"],
         "text_config.rope_parameters": {"sliding_attention": ROPE, "full_attention": None}}
    ),
    "qwen4_exp_text": Small(INDEXER),
    "qwen4_exp": Small({f"text_config.{name}": value for name, value in INDEXER.items()}),
    "informer": Small({**SERIES, "distil": False}, series),
    "sam2_hiera_det_model": Small({"hidden_size": 16}),
    "sam2_vision_model": Small(SAM2),
    "sam2": Small(
        {f"vision_config.{k}": v for k, v in SAM2.items()}
        | {"prompt_encoder_config.image_size": 64, "prompt_encoder_config.patch_size": 16},
        lambda c: {"pixel_values": torch.randn(BATCH, 3, 64, 64), "input_points": torch.rand(BATCH, 1, 2, 2) * 64},
    ),
    "siglip2": Small(
        {"vision_config.num_patches": 16},
        lambda c: {**patches_with_sizes(c.vision_config), "input_ids": words(LENGTH)},
    ),
    "clap": Small(
        {"audio_config.spec_size": 128, "audio_config.patch_embeds_hidden_size": 16, "audio_config.hidden_size": 128,
         "audio_config.num_attention_heads": (1, 2, 4, 8)},
        lambda c: {"input_ids": words(LENGTH), "attention_mask": padding_mask(LENGTH), "input_features": torch.randn(BATCH, 1, 256, 64),
                   "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool)},
    ),
    "clvp": Small(
        {"decoder_config.vocab_size": 256, "speech_config.vocab_size": 256,
         "speech_config.hidden_size": 128, "text_config.hidden_size": 128},
        lambda c: {"input_ids": words(LENGTH), "attention_mask": padding_mask(LENGTH), "input_features": torch.randn(BATCH, 80, 32)},
        with_answers,
    ),
    "pp_doclayout_v3": Small(
        {"backbone_config": hgnet("stage1", "stage2", "stage3", "stage4"), "encoder_in_channels": (32, 64, 128),
         "decoder_in_channels": (64, 64, 64), "x4_feat_dim": 16}
    ),
    "pp_doclayout_v4": Small(
        {"backbone_config": hgnet("stage2", "stage3", "stage4"), "encoder_in_channels": (32, 64, 128), "decoder_in_channels": (64, 64, 64)}
    ),
    "pp_ocrv5_server_rec": Small({f"backbone_config.{k}": v for k, v in HGNET.items()}, line_of_text),
    **dict.fromkeys(("pp_ocrv6_small_rec", "pp_ocrv6_tiny_rec"), Small({}, line_of_text)),
    "pp_ocrv5_mobile_rec": Small({}, lambda c: {"pixel_values": torch.randn(BATCH, 3, 96, 96)}),
    "sapiens2": Small({"num_key_value_heads_per_layer": [4, 2]}),
    "lw_detr": Small({"backbone_config.num_windows": 4, "projector_scale_factors": [1.0]}),
    "sam3_tracker": Small(
        {"vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
        lambda c: {"pixel_values": torch.randn(BATCH, 3, 32, 32), "input_points": torch.rand(BATCH, 1, 2, 2) * 32},
    ),
    "depth_pro": Small(
        {"patch_size": 32, "intermediate_hook_ids": (1, 0), "intermediate_feature_dims": (64, 64)},
        lambda c: {"pixel_values": torch.randn(BATCH, 3, 128, 128)},
    ),
    "efficientloftr": Small(
        {"stage_num_blocks": [1, 1, 1, 1], "out_features": [16, 16, 32, 64], "hidden_size": 64, "num_attention_heads": 8},
        lambda c: {"pixel_values": torch.randn(BATCH, 2, 3, 64, 64)},
    ),
    "pe_audio": Small({}, lambda c: {"input_ids": words(LENGTH), "input_values": torch.randn(BATCH, 1, 4 * 1920)}),
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
