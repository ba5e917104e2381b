"""Types whose inputs no name tells, and those of which only a part can be traced.

"perceiver": Small(inputs=…)        "bark": Small({}, part=lambda m: m.semantic)
"""

from __future__ import annotations

import torch

from zoo.examples import BATCH, LENGTH, padding_mask, pixels, words
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
from zoo.small import Small
from zoo.small_fields import C5, HGNET, SAM2, swin_backbone

SERIES = {
    "prediction_length": 4,
    "context_length": 16,
    "num_time_features": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "d_model": 32,
}

INPUTS: dict[str, Small] = {
    **dict.fromkeys(("conditional_detr", "dab-detr", "detr", "table-transformer"), Small(C5, wide_image)),
    "dbrx": Small({"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0}, part=with_dense_experts),
    "decision_transformer": Small(
        {},
        lambda c: {
            "states": torch.randn(BATCH, 5, c.state_dim),
            "actions": torch.randn(BATCH, 5, c.act_dim),
            "returns_to_go": torch.randn(BATCH, 5, 1),
            "timesteps": torch.arange(5).expand(BATCH, 5).clone(),
            "attention_mask": torch.ones(BATCH, 5, dtype=torch.long),
        },
    ),
    "diffusion_gemma": Small(
        {
            "text_config.num_experts": 4,
            "text_config.top_k_experts": 2,
            "text_config.moe_intermediate_size": 64,
            "canvas_length": 8,
        },
        lambda c: {"input_ids": words(LENGTH), "attention_mask": padding_mask(LENGTH), "decoder_input_ids": words(8)},
    ),
    "led": Small({"attention_window": 6}, windowed, lambda m: WindowedLayer(m.encoder.layers[0].self_attn.longformer_self_attn)),
    "longformer": Small({"attention_window": 6}, windowed, lambda m: WindowedLayer(m.encoder.layer[0].attention.self)),
    "sam_hq": Small(
        {
            "vision_config.output_channels": 64,
            "vision_config.num_pos_feats": 32,
            "vision_config.window_size": 2,
            "vision_config.global_attn_indexes": (1,),
            "prompt_encoder_config.hidden_size": 64,
            "mask_decoder_config.vit_dim": 64,
        },
        lambda c: {"pixel_values": pixels(c), "input_points": torch.rand(BATCH, 1, 2, 2) * 32},
    ),
    "seggpt": Small(
        {"image_size": (64, 32)},
        lambda c: {
            "pixel_values": torch.randn(BATCH, 3, 32, 32),
            "prompt_pixel_values": torch.randn(BATCH, 3, 32, 32),
            "prompt_masks": torch.randn(BATCH, 3, 32, 32),
        },
    ),
    "speecht5": Small(
        {},
        lambda c: {
            "input_values": torch.randn(BATCH, LENGTH, c.hidden_size),
            "decoder_input_values": torch.randn(BATCH, 7, c.hidden_size),
            "attention_mask": padding_mask(LENGTH),
        },
    ),
    "timesfm": Small(
        {},
        lambda c: {
            "past_values": torch.randn(BATCH, 64),
            "past_values_padding": torch.zeros(BATCH, 64, dtype=torch.long),
            "freq": torch.zeros(BATCH, 1, dtype=torch.long),
        },
    ),
    "vit_mae": Small({}, lambda c: {"pixel_values": pixels(c), "noise": torch.rand(BATCH, (c.image_size // c.patch_size) ** 2)}),
    "siglip2_vision_model": Small({"num_patches": 16}, patches_with_sizes),
    "gemma3": Small({}, text_alone),  # with token_type_ids torch.export records the inside of a vmap
    "autoformer": Small({**SERIES, "label_length": 12}, series),
    "time_series_transformer": Small(SERIES, series),
    "perceiver": Small(
        {"d_model": 64, "d_latents": 64, "num_self_attends_per_block": 2, "num_latents": 8},
        lambda c: {"inputs": torch.randn(BATCH, LENGTH, c.d_model), "attention_mask": padding_mask(LENGTH)},
    ),
    "sam": Small(
        {
            "vision_config.output_channels": 64,
            "vision_config.num_pos_feats": 32,
            "vision_config.window_size": 2,
            "vision_config.global_attn_indexes": (1,),
            "prompt_encoder_config.hidden_size": 64,
        },
        lambda c: {"pixel_values": pixels(c), "input_points": torch.rand(BATCH, 1, 2, 2) * 32},
    ),
    "xcodec": Small({}, wave()),
    "lxmert": Small(
        {},
        lambda c: {
            "input_ids": words(LENGTH),
            "attention_mask": padding_mask(LENGTH),
            "visual_feats": torch.randn(BATCH, 5, c.visual_feat_dim),
            "visual_pos": torch.rand(BATCH, 5, 4),
        },
    ),
    "kosmos-2": Small(
        {"latent_query_num": 8},
        lambda c: {
            "input_ids": words(LENGTH),
            "attention_mask": padding_mask(LENGTH),
            "pixel_values": pixels(c.vision_config),
            "image_embeds_position_mask": (torch.arange(LENGTH) < c.latent_query_num).expand(BATCH, LENGTH),
        },
    ),
    "kimi_k25_vision": Small({}, image_of_patches, with_answers),
    **dict.fromkeys(("minicpm_ocr_vision", "minicpmv4_7_vision"), Small({"insert_layer_id": 0}, row_of_patches, with_answers)),
    "inkling2_vision": Small(
        {},
        lambda c: {
            "pixel_values": torch.randn(8, 2 * c.patch_size, 2 * c.patch_size, 3),
            "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]]),
        },
        with_answers,
    ),
    "gemma4_vision": Small(
        {"pooling_kernel_size": 2},
        lambda c: {
            "pixel_values": torch.randn(BATCH, 16, 3 * c.patch_size**2),
            "pixel_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(BATCH, 16, 2),
        },
    ),
    "bark": Small({}, part=lambda m: m.semantic),
    **dict.fromkeys(("fsmt", "fastspeech2_conformer", "fastspeech2_conformer_with_hifigan"), Small({}, part=with_answers)),
    "encodec": Small({}, wave(), with_answers),
    "longcat_flash": Small({"zero_expert_num": 4}, part=with_answers),
    "blt": Small({}, part=with_answers),
    "idefics": Small(
        {},
        lambda c: {
            "input_ids": words(LENGTH),
            "attention_mask": padding_mask(LENGTH),
            "pixel_values": torch.randn(BATCH, 1, 3, 32, 32),
            "image_attention_mask": torch.ones(BATCH, LENGTH, 1, dtype=torch.long),
            "use_cache": False,
        },
    ),
    "blip-2": Small({"image_token_index": 20}, text_with(8, pixel_values=lambda c: pixels(c.vision_config))),
    "instructblip": Small(
        {"image_token_index": 20},
        text_with(8, pixel_values=lambda c: pixels(c.vision_config), qformer_input_ids=lambda c: words(5)),
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
        lambda c: {
            "input_features": torch.randn(BATCH, c.num_mel_bins, 400),
            "input_features_mask": torch.ones(BATCH, 400, dtype=torch.long),
        },
        with_answers,
    ),
    "fun_asr_nano_encoder": Small(
        {}, lambda c: {"input_features": torch.randn(BATCH, 16, 560), "input_features_mask": padding_mask(16)}
    ),
    "gemma3n_audio": Small({}, mel_last("audio_mel", "audio_mel_mask")),
    "gemma4_audio": Small({}, mel_last("input_features", "attention_mask", 64)),
    **dict.fromkeys(
        ("granite_speech5_ctc", "granite_speech5_encoder"), Small({}, mel_last("input_features", "attention_mask", 320))
    ),
    **dict.fromkeys(("xcodec2", "neucodec"), Small({"quantization_dim": 128}, wave_and_mel)),
    "oneformer": Small(
        {"backbone_config": swin_backbone()},
        lambda c: {"pixel_values": torch.randn(BATCH, 3, 64, 64), "task_inputs": torch.randint(3, 100, (BATCH, c.task_seq_len))},
    ),
    "timesfm2_5": Small(
        {}, lambda c: {"past_values": torch.randn(BATCH, 64), "past_values_padding": torch.zeros(BATCH, 64, dtype=torch.long)}
    ),
    "pi0": Small(
        {},
        text_with(
            16,
            pixel_values=lambda c: pixels(c.vlm_config.vision_config)[:, None],
            pixel_attention_mask=lambda c: torch.ones(BATCH, 1, dtype=torch.bool),
            action_embeds=lambda c: torch.randn(BATCH, 5, c.dit_config.hidden_size),
        ),
    ),
    "vibevoice_acoustic_tokenizer": Small({"num_filters": 4}, wave(samples=6400)),
    "vibevoice_acoustic_tokenizer_decoder": Small(
        {"num_filters": 4}, lambda c: {"hidden_states": torch.randn(BATCH, c.hidden_size, 4)}
    ),
    "vibevoice_acoustic_tokenizer_encoder": Small({"num_filters": 4}, lambda c: {"hidden_states": torch.randn(BATCH, 1, 6400)}),
    "voxtral_realtime": Small(
        {}, lambda c: {"input_ids": words(LENGTH), "input_features": torch.randn(BATCH, c.audio_config.num_mel_bins, 8 * LENGTH)}
    ),
    "informer": Small({**SERIES, "distil": False}, series),
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
        {
            "audio_config.spec_size": 128,
            "audio_config.patch_embeds_hidden_size": 16,
            "audio_config.hidden_size": 128,
            "audio_config.num_attention_heads": (1, 2, 4, 8),
        },
        lambda c: {
            "input_ids": words(LENGTH),
            "attention_mask": padding_mask(LENGTH),
            "input_features": torch.randn(BATCH, 1, 256, 64),
            "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool),
        },
    ),
    "clvp": Small(
        {
            "decoder_config.vocab_size": 256,
            "speech_config.vocab_size": 256,
            "speech_config.hidden_size": 128,
            "text_config.hidden_size": 128,
        },
        lambda c: {
            "input_ids": words(LENGTH),
            "attention_mask": padding_mask(LENGTH),
            "input_features": torch.randn(BATCH, 80, 32),
        },
        with_answers,
    ),
    "pp_ocrv5_server_rec": Small({f"backbone_config.{k}": v for k, v in HGNET.items()}, line_of_text),
    **dict.fromkeys(("pp_ocrv6_small_rec", "pp_ocrv6_tiny_rec"), Small({}, line_of_text)),
    "pp_ocrv5_mobile_rec": Small({}, lambda c: {"pixel_values": torch.randn(BATCH, 3, 96, 96)}),
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
        (
            "cohere_compass_vision",
            "glm5_next_vision",
            "qwen3_5_moe_vision",
            "qwen3_vl_moe_vision",
            "qwen3_vl_vision",
            "qwen4_exp_vision",
        ),
        Small({}, patches_with_grid(), with_answers),
    ),
    **dict.fromkeys(
        ("glm4v_moe_vision", "glm4v_vision", "qwen3_5_vision", "glm_ocr_vision"),
        Small({}, patches_with_grid(), with_answers),
    ),
}
