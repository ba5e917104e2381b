"""Inputs of small models that no parameter's name tells.

    patches_with_grid()(config)   ->   {"hidden_states": [32, 192], "grid_thw": [[1, 4, 4], [1, 4, 4]]}

A maker of inputs takes the small configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zoo.examples import BATCH, LENGTH, Inputs, padding_mask, words


def text_alone(config: Any) -> Inputs:
    return {"input_ids": words(LENGTH), "attention_mask": padding_mask(LENGTH), "use_cache": False}


def text_with(count: int, token: int = 20, **others: Callable[[Any], torch.Tensor]) -> Callable[[Any], Inputs]:
    """Text that holds the places of `count` tokens of another kind, and what goes there."""

    def made(config: Any) -> Inputs:
        ids = torch.cat([torch.full((BATCH, count), token), words(LENGTH)], 1)
        return {"input_ids": ids, "attention_mask": padding_mask(ids.shape[1]), **{k: make(config) for k, make in others.items()}}

    return made


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


def patches_with_sizes(config: Any) -> Inputs:
    """Two images of 4 x 4 patches, and how many patches each side has."""
    return {
        "pixel_values": torch.randn(BATCH, 16, 3 * config.patch_size**2),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def wide_image(config: Any) -> Inputs:
    """Six places where the backbone ends, and padding in one of two images."""
    mask = torch.ones(BATCH, 64, 96, dtype=torch.long)
    mask[1, :, 64:] = 0
    return {"pixel_values": torch.randn(BATCH, 3, 64, 96), "pixel_mask": mask}


def line_of_text(config: Any) -> Inputs:
    return {"pixel_values": torch.randn(BATCH, 3, 48, 96)}


def windowed(config: Any) -> Inputs:
    """Hidden states of whole windows, and the additive mask of their padding."""
    length = 4 * config.attention_window[0] if isinstance(config.attention_window, (list, tuple)) else 4 * config.attention_window
    mask = (1.0 - padding_mask(length, torch.float32)) * -10000.0
    return {"hidden_states": torch.randn(BATCH, length, config.hidden_size), "attention_mask": mask}


def wave(channels: int = 1, samples: int = 2000) -> Callable[[Any], Inputs]:
    return lambda config: {"input_values": torch.randn(BATCH, channels, samples)}


def mel_first(config: Any) -> Inputs:
    """Whole windows of frames, with padding in one of two recordings."""
    frames = 2 * getattr(config, "max_source_positions", 16)
    return {"input_features": torch.randn(BATCH, config.num_mel_bins, frames), "input_features_mask": padding_mask(frames)}


def mel_last(name: str, mask: str, bins: int = 128) -> Callable[[Any], Inputs]:
    return lambda config: {name: torch.randn(BATCH, 48, bins), mask: padding_mask(48, torch.bool)}


def wave_and_mel(config: Any) -> Inputs:
    return {"input_values": torch.randn(BATCH, 1, 3200), "input_features": torch.randn(BATCH, 10, 160)}


def series(config: Any) -> Inputs:
    past, future = config.context_length + max(config.lags_sequence), config.prediction_length
    return {
        "past_values": torch.randn(BATCH, past),
        "past_time_features": torch.randn(BATCH, past, config.num_time_features),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": torch.randn(BATCH, future),
        "future_time_features": torch.randn(BATCH, future, config.num_time_features),
    }
