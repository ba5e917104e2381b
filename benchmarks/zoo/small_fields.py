"""Types that need other fields than generic shrinking decides: sizes that must fit together, kinds of layers, token numbers.

"swin": Small({"image_size": 32, "depths": (2, 2), …})
"""

from __future__ import annotations

from typing import Any

from transformers import HGNetV2Config, ResNetConfig, SwinConfig

from zoo.shrink import WINDOW
from zoo.small import Small


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

FIELDS: dict[str, Small] = {
    "deformable_detr": Small(C345),
    "donut-swin": Small(SWIN),
    "maskformer-swin": Small(SWIN),
    "swin": Small(SWIN),
    "swinv2": Small(SWIN),
    "bamba": Small({**MAMBA, "attn_layer_indices": [1]}),
    "chameleon": Small({"vocabulary_map": {"<image>": 20}}),
    "cvt": Small({"embed_dim": (16, 32, 64), "num_heads": (1, 2, 4), "depth": (1, 1, 2)}),
    "deepseek_ocr2": Small(
        {
            "text_config.mlp_layer_types": ["dense", "sparse"],
            "text_config.num_experts_per_tok": 2,
            "text_config.n_group": 1,
            "text_config.topk_group": 1,
        }
    ),
    "deepseek_v2": Small({"num_experts_per_tok": 2}),
    "emu3": Small({"vocabulary_map": {"<image>": 20}, "vq_config.base_channels": 32}),
    "inkling_mm_model": Small({"vision_config.num_hidden_layers": 8}),
    "esm": Small({"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}),
    "falcon_h1": Small({**MAMBA, "mamba_d_ssm": 128}),
    "funnel": Small(
        {"architectures": ["FunnelModel"], "block_sizes": (1, 1), "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 64}
    ),
    "granitemoehybrid": Small({**MAMBA, "layer_types": ["mamba", "attention"], "num_hidden_layers": 2}),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "nemotron"), Small({"head_dim": 16})),
    "levit": Small(
        {"image_size": 64, "patch_size": 16, "hidden_sizes": (32, 48, 64), "num_attention_heads": (2, 3, 4), "depths": (1, 1, 1)}
    ),
    "lfm2_moe": Small({"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}),
    "lilt": Small({"hidden_size": 96, "intermediate_size": 96}),
    "mamba2": Small({"num_heads": 8, "head_dim": 16, "n_groups": 1}),
    **dict.fromkeys(("mask2former", "maskformer"), Small({"backbone_config": swin_backbone()})),
    "grounding-dino": Small({"num_queries": 2}),
    "mm-grounding-dino": Small({"num_queries": 2}),
    "nemotron_h": Small(
        {"layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1}
    ),
    "vjepa2": Small({"crop_size": 32, "patch_size": 8, "frames_per_clip": 4}),
    "xlnet": Small({"d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 64}),
    "zamba": Small({"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4}),
    "gpt_neo": Small({"attention_types": [[["global", "local"], 1]], "num_layers": 2}),
    "xmod": Small({"default_language": "en_XX"}),
    "glm4v_text": Small(MROPE),
    "glm_image_text": Small(MROPE),
    "glm_ocr_text": Small(MROPE),
    "qwen2_5_vl_text": Small(MROPE),
    "qwen2_vl_text": Small(MROPE),
    **dict.fromkeys(
        ("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl"),
        Small({"text_config.rope_parameters": three_axes(2, 3, 3)}),
    ),
    "glm4v_moe": Small({"text_config.rope_parameters": {**three_axes(1, 1, 2), "partial_rotary_factor": 0.5}}),
    "glm4v_moe_text": Small({"rope_parameters": {**three_axes(1, 1, 2), "partial_rotary_factor": 0.5}}),
    "pegasus_x": Small({"block_size": 8, "num_global_tokens": 3}),
    "rt_detr": Small({"encoder_in_channels": [64, 128, 256], "decoder_in_channels": [64, 64, 64]}),
    "rt_detr_v2": Small({"encoder_in_channels": [64, 128, 256], "decoder_in_channels": [64, 64, 64]}),
    "align": Small({"projection_dim": 640}),
    "bit": Small({"num_groups": 8}),
    "efficientnet": Small({"hidden_dim": 2560}),
    "hgnet_v2": Small(HGNET),
    **dict.fromkeys(
        ("d_fine", "deimv2"),
        Small(
            {
                "backbone_config": hgnet("stage2", "stage3", "stage4"),
                "encoder_in_channels": (32, 64, 128),
                "decoder_in_channels": (64, 64, 64),
            }
        ),
    ),
    "dots1": Small({"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "hunyuan_vl_text": Small({"head_dim": 16, "rope_parameters": three_axes(2, 2, 2, 2)}),
    "hunyuan_vl": Small({"text_config.head_dim": 16, "text_config.rope_parameters": three_axes(2, 2, 2, 2)}),
    "ernie4_5_vl_moe": Small({"text_config.rope_parameters": three_axes(3, 3, 2)}),
    "glm_image": Small({"text_config.rope_parameters": three_axes(2, 3, 3)}),
    "nemo_speechlm": Small({"text_config.n_groups": 1, "text_config.mamba_num_heads": 8}),
    **dict.fromkeys(("granite_speech", "granite_speech_plus"), Small({"encoder_config.context_size": 16})),
    "granite4_vision": Small({"downsample_rate": "2/4", "deepstack_layer_map": [(-1, 0)], "spatial_target_layers": [1]}),
    "glm5_next_text": Small({"index_topk": 4, "index_kpool": 2}),
    "glm5_next": Small({"text_config.index_topk": 4, "text_config.index_kpool": 2}),
    "fun_asr_nano": Small({"adaptor_config.intermediate_size": 16}),
    "textnet": Small({"stem_out_channels": 16}),
    "vibevoice": Small({"audio_config.num_filters": 4, "semantic_model_config.num_filters": 4}),
    "vibevoice_asr": Small(
        {
            "acoustic_tokenizer_chunk_size": 3200,
            "acoustic_tokenizer_encoder_config.num_filters": 4,
            "semantic_tokenizer_encoder_config.num_filters": 4,
        }
    ),
    "step3p7": Small(
        {
            "text_config.sliding_window": WINDOW,
            "text_config.layer_types": ["sliding_attention", "full_attention"],
            "text_config.rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), ROPE),
        }
    ),
    "cohere_compass_text": Small(
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"sliding_attention": ROPE, "full_attention": None},
        }
    ),
    "cohere_compass": Small(
        {
            "text_config.layer_types": ["sliding_attention", "full_attention"],
            "text_config.rope_parameters": {"sliding_attention": ROPE, "full_attention": None},
        }
    ),
    "qwen4_exp_text": Small(INDEXER),
    "qwen4_exp": Small({f"text_config.{name}": value for name, value in INDEXER.items()}),
    "sam2_hiera_det_model": Small({"hidden_size": 16}),
    "sam2_vision_model": Small(SAM2),
    "pp_doclayout_v3": Small(
        {
            "backbone_config": hgnet("stage1", "stage2", "stage3", "stage4"),
            "encoder_in_channels": (32, 64, 128),
            "decoder_in_channels": (64, 64, 64),
            "x4_feat_dim": 16,
        }
    ),
    "pp_doclayout_v4": Small(
        {
            "backbone_config": hgnet("stage2", "stage3", "stage4"),
            "encoder_in_channels": (32, 64, 128),
            "decoder_in_channels": (64, 64, 64),
        }
    ),
    "sapiens2": Small({"num_key_value_heads_per_layer": [4, 2]}),
    "lw_detr": Small({"backbone_config.num_windows": 4, "projector_scale_factors": [1.0]}),
}
