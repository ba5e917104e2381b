"""Example inputs for any model, from the names of its parameters and the sizes in its configuration.

    forward(input_ids, attention_mask, …)   ->   {"input_ids": [2, 12], "attention_mask": [2, 12] with padding}
    forward(pixel_values, …)                ->   {"pixel_values": [2, 3, 32, 32]}

What a model takes cannot be known from names alone, so there are several proposals, the fullest first; the first on which the
model runs is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

BATCH, LENGTH, DECODER_LENGTH, PADDED = 2, 12, 7, 3
FIRST_TEXT, LAST_TEXT = 3, 20  # ids of words: above the special tokens that stay, below those that are moved
SAMPLES, FRAMES, VIDEO = 2000, 32, 4

Inputs = dict[str, Any]


def configurations(config: Any) -> Iterator[Any]:
    """The configuration and those inside of it, outermost first."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configurations(value)


def setting(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that is set, anywhere in the configuration."""
    for part in configurations(config):
        for name in names:
            try:
                value = getattr(part, name, None)
            except Exception:  # a field that differs by layer refuses to be read as one
                continue
            if value is not None:
                return value
    return default


def pair(size: Any) -> tuple[int, int]:
    return (int(size[0]), int(size[-1])) if isinstance(size, (list, tuple)) else (int(size), int(size))


def padding_mask(length: int, dtype: torch.dtype = torch.long) -> Tensor:
    """Ones, with padding at the end of row 1."""
    mask = torch.ones(BATCH, length, dtype=dtype)
    mask[1, -PADDED:] = 0
    return mask


def words(length: int) -> Tensor:
    return torch.randint(FIRST_TEXT, LAST_TEXT, (BATCH, length))


def pixels(config: Any, frames: int = 0) -> Tensor:
    image = setting(config, "image_size", "img_size", "crop_size", default=32)
    height, width = pair(32 if isinstance(image, dict) else image)
    channels = setting(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    return torch.randn(BATCH, *([frames] if frames else []), channels, height, width)


def features(config: Any, time_last: bool, frames: int | None = None) -> Tensor:
    bins = setting(
        config, "num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", "n_mels", "input_dim",
        "input_feat_size", "mel_bins", "model_in_channels", default=80,
    )  # fmt: skip
    frames = frames or FRAMES
    return torch.randn(BATCH, bins, frames) if time_last else torch.randn(BATCH, frames, bins)


Makers = Mapping[str, Callable[[Any], Any]]
TEXT: Makers = {
    "input_ids": lambda c: words(LENGTH),
    "attention_mask": lambda c: padding_mask(LENGTH),
    "token_type_ids": lambda c: torch.zeros(BATCH, LENGTH, dtype=torch.long),
    "bbox": lambda c: torch.tensor([1, 2, 9, 11]).expand(BATCH, LENGTH, 4).clone(),
    "xpath_tags_seq": lambda c: torch.zeros(BATCH, LENGTH, int(setting(c, "max_depth", default=50)), dtype=torch.long),
    "decoder_input_ids": lambda c: words(DECODER_LENGTH),
}
IDS_ONLY: Makers = {"input_ids": TEXT["input_ids"]}
IMAGE: Makers = {"pixel_values": pixels}
VIDEO_FRAMES: Makers = {
    "pixel_values": lambda c: pixels(c, setting(c, "num_frames", default=VIDEO)),
    "pixel_values_videos": lambda c: pixels(c, setting(c, "num_frames", "frames_per_clip", default=VIDEO)),
}
MEL_FIRST: Makers = {
    "input_features": lambda c: features(c, True, 2 * setting(c, "max_source_positions", default=FRAMES // 2)),
    "decoder_input_ids": TEXT["decoder_input_ids"],
}
MEL_LAST: Makers = {
    "input_features": lambda c: features(c, False),
    "attention_mask": lambda c: padding_mask(FRAMES),
    "input_features_mask": lambda c: padding_mask(FRAMES, torch.bool),
    "decoder_input_ids": TEXT["decoder_input_ids"],
}
WAVE: Makers = {"input_values": lambda c: torch.randn(BATCH, SAMPLES), "decoder_input_ids": TEXT["decoder_input_ids"]}
WAVE_CHANNELS: Makers = {"input_values": lambda c: torch.randn(BATCH, setting(c, "audio_channels", default=1), SAMPLES)}
SPECTROGRAM: Makers = {"input_values": lambda c: torch.randn(BATCH, setting(c, "max_length"), setting(c, "num_mel_bins"))}
SERIES: Makers = {
    "past_values": lambda c: torch.randn(
        BATCH, setting(c, "context_length", default=32), setting(c, "num_input_channels", default=1)
    ),
}
EMBEDDED: Makers = {
    "inputs_embeds": lambda c: torch.randn(BATCH, LENGTH, setting(c, "hidden_size", "d_model")),
    "attention_mask": TEXT["attention_mask"],
}
AFTER_TEXT: Makers = {
    "encoder_hidden_states": lambda c: torch.randn(BATCH, LENGTH, setting(c, "encoder_hidden_size", "hidden_size"))
}
QUERIES: Makers = {"query_embeds": lambda c: torch.randn(BATCH, 8, setting(c, "hidden_size")), **AFTER_TEXT}


def proposals(model: nn.Module, config: Any) -> Iterator[Inputs]:
    """Keyword inputs, the fullest first."""
    takes = set(inspect.signature(model.forward).parameters)
    if "image_grid_thw" not in takes:
        yield from with_image_tokens(model, config, takes)
    for makers in (
        {**TEXT, **IMAGE}, {**TEXT, **VIDEO_FRAMES}, {**TEXT, **MEL_FIRST}, {**TEXT, **MEL_LAST}, TEXT, {**IDS_ONLY, **IMAGE}, IDS_ONLY,
        IMAGE, VIDEO_FRAMES, MEL_LAST, MEL_FIRST, WAVE, WAVE_CHANNELS, SPECTROGRAM, SERIES, QUERIES, EMBEDDED,
    ):  # fmt: skip
        if not any(name in takes for name in makers):
            continue
        try:
            made = {name: make(config) for name, make in makers.items() if name in takes}
        except (TypeError, ValueError):  # a size that this configuration does not have
            continue
        if "use_cache" in takes:
            made["use_cache"] = False
        yield made


def with_image_tokens(model: nn.Module, config: Any, takes: set[str]) -> Iterator[Inputs]:
    """Text that holds the place of an image, as many tokens as the model makes of one."""
    token = setting(config, "image_token_id", "image_token_index")
    if token is None or not {"input_ids", "pixel_values"} <= takes or not hasattr(model, "get_image_features"):
        return
    image = pixels(config)
    try:
        with torch.no_grad():
            found = model.get_image_features(pixel_values=image)
    except Exception:  # the tower wants more than pixels: the other proposals stand
        return
    found = getattr(found, "pooler_output", found)
    count = sum(f.shape[:-1].numel() for f in found) if isinstance(found, (list, tuple)) else found.shape[:-1].numel()
    ids = torch.cat([torch.full((BATCH, count // BATCH), int(token)), words(LENGTH)], 1)
    yield {"input_ids": ids, "attention_mask": padding_mask(ids.shape[1]), "pixel_values": image} | (
        {"use_cache": False} if "use_cache" in takes else {}
    )


def runs(model: nn.Module, inputs: Inputs) -> bool:
    with torch.no_grad():
        model(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()})
    return True


def example_inputs(model: nn.Module, config: Any) -> Inputs:
    """The first proposal on which the model runs; raises what the first of them met where none does."""
    first: Exception | None = None
    for inputs in proposals(model, config):
        try:
            runs(model, inputs)
            return inputs
        except Exception as failure:
            first = first or failure
    raise first or ValueError("nothing among the known inputs fits this model")
