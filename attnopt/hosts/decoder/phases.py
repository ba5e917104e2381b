"""The two phases of generation as modules that torch.export and ONNX can take: caches are arguments and results, not objects.

    Prefill   (input_ids [B, L], attention_mask [B, L], position_ids [B, L])                ->   logits [B, L, V], ((k, v), …)
    Decode    (input_ids [B, 1], attention_mask [B, P + 1], position_ids [B, 1], ((k, v), …))   ->   logits [B, 1, V], ((k, v), …)

k, v: [B, Hk, P, D] of each layer, all tokens so far; they return with one token more. attention_mask counts the past too: 0 where a
shorter text of the batch is padded on the left. A model that takes no position_ids counts positions itself, and has no such input.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.errors import InputMismatch, UnsupportedFormat

Past = tuple[tuple[Tensor, Tensor], ...]
PLAIN = ("DynamicLayer", "DynamicSlidingWindowLayer")  # cache layers that are a pair of keys and values


class Phase(nn.Module):
    """What both phases share: one call of the model with a cache made for it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def call(self, named: Mapping[str, Tensor], past: Past) -> tuple[Tensor, Past]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (k, v) in enumerate(past):
            cache.update(k, v, layer)
        logits = self.model(**named, past_key_values=cache, use_cache=True).logits
        return logits, tuple((layer.keys, layer.values) for layer in cache.layers)


class Prefill(Phase):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> tuple[Tensor, Past]:
        return self.call({"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}, ())


class Decode(Phase):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Past
    ) -> tuple[Tensor, Past]:
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self.call(named, past_key_values)


class PrefillUnplaced(Phase):
    """Of a model that counts positions itself."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Past]:
        return self.call({"input_ids": input_ids, "attention_mask": attention_mask}, ())


class DecodeUnplaced(Phase):
    """Of a model that counts positions itself."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Past) -> tuple[Tensor, Past]:
        return self.call({"input_ids": input_ids, "attention_mask": attention_mask}, past_key_values)


def phases(model: nn.Module) -> tuple[Phase, Phase]:
    """Prefill and decode of a decoder. Raises UnsupportedFormat for what is none, naming what is in the way."""
    takes = inspect.signature(model.forward).parameters
    name = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedFormat(
            f"{name} has an encoder beside its decoder, and two caches",
            next_move="Export its parts with attnopt.optimize(…).export(…).",
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    missing = [argument for argument in ("input_ids", "attention_mask", "past_key_values", "use_cache") if argument not in takes]
    if missing or head is None:
        lacks = f"its forward takes no {', '.join(missing)}" if missing else "it has no head for tokens"
        raise UnsupportedFormat(
            f"{name} is no decoder of transformers: {lacks}",
            next_move="Give a model of a …ForCausalLM class.",
        )
    placed = "position_ids" in takes
    return (Prefill if placed else PrefillUnplaced)(model).eval(), (Decode if placed else DecodeUnplaced)(model).eval()


def positions(mask: Tensor) -> Tensor:
    """Of each token the number of real tokens before it, [B, L]; 0 for padding on the left."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def prompt(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs of Prefill: input_ids [B, L], and an attention_mask [B, L] where some text is padded on the left."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise InputMismatch(
            f"'attention_mask' is {list(mask.shape)}, and 'input_ids' is {list(ids.shape)}",
            next_move="Give one number for each token.",
        )
    if bool((mask[:, -1] == 0).any()):
        raise InputMismatch(
            "a text is padded on its right", where="attention_mask", next_move="Pad on the left, as generation does."
        )
    named = {"input_ids": ids, "attention_mask": mask}
    return named | ({"position_ids": positions(mask)} if "position_ids" in inspect.signature(model.forward).parameters else {})


def last_token(prefill: Phase, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inputs of Decode that stand for the last token of a prompt: all before it is past."""
    before = {name: x[:, :-1] for name, x in named.items()}
    with torch.no_grad():
        _, past = prefill(**before)
    require_pairs(prefill.model, past)
    return {name: x if name == "attention_mask" else x[:, -1:] for name, x in named.items()} | {"past_key_values": past}


def require_pairs(model: nn.Module, past: Sequence[Any]) -> None:
    """UnsupportedFormat for a model of which some layer keeps something else than keys and values of all tokens."""
    for layer, pair in enumerate(past):
        if any(x is None or x.ndim != 4 for x in pair):
            raise UnsupportedFormat(
                f"layer {layer} of {type(model).__name__} keeps no keys and values",
                next_move="Only attention can be exported with its cache.",
            )
