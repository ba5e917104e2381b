"""The modules that stand in a live model where a rewrite left something else than it found.

    Linear(x)        ->   Int8Linear(x)          an int8 weight, the input quantised for each call
    Linear(x)        ->   RoundedLinear(x)       a weight in few bits, made whole when read
    Embedding(ids)   ->   RoundedRows(ids)       a table in few bits
    Embedding(ids)   ->   Int8Rows(ids)          a table in the int8 codes of the layer that it is tied to
    Linear(x)        ->   LowRankLinear(x)       two narrow products for one
    Linear(x)        ->   NarrowLinear(x)        the channels of narrower heads, zeros for the others
    RMSNorm(x)       ->   PlainNorm(x)           in one call, without a gain, or without taking the mean off
    Embedding(ids)   ->   CentredRows(ids)       rows less their mean, of a table that another layer reads as it is
    attention(x)     ->   NoAttention(x)         0, and a token's place in the cache

A layer of which `options["mixed"]` says so reads its input in Hadamard blocks of so many channels. Each computes by the operator that the
traced graph calls, so both give the same numbers. All they hold are buffers: a checkpoint of the
model holds them by the names of the modules that they replace.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.rounding.hadamard import hadamard
from attnopt.runtime.dynamic_int8 import int8_rows, linear_dynamic_int8
from attnopt.runtime.rounded_linear import rounded_linear, rounded_rows


class Holding(nn.Module):
    """A module of named tensors, some of which may be absent, and of plain options."""

    names: tuple[str, ...] = ()

    def __init__(self, tensors: Mapping[str, Tensor], **options: Any) -> None:
        super().__init__()
        for name in self.names:
            self.register_buffer(name, tensors.get(name))
        self.options = dict(options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(x.shape)} {x.dtype}" for name, x in self.named_buffers())


class HoldingLinear(Holding):
    """factors [in] multiply the input first, where there are any; options mixed: the width of the blocks that it is mixed in."""

    mixing: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], **options: Any) -> None:
        super().__init__(tensors, **options)
        if (block := options.get("mixed")) is not None:
            self.register_buffer("mixing", mixing(block), persistent=False)

    def read(self, x: Tensor) -> Tensor:
        x = x if self.factors is None else x * self.factors
        block = self.options.get("mixed")
        return x if block is None else (x.unflatten(-1, (-1, block)) @ self.mixing.to(x.dtype)).flatten(-2)


@lru_cache(maxsize=8)
def mixing(block: int) -> Tensor:
    """One matrix for all layers of a block width."""
    made = hadamard(block)
    assert made is not None
    return made.float()


class Int8Linear(HoldingLinear):
    """weight int8 [out, in], scales [out], bias [out] or None."""

    names = ("weight", "scales", "bias", "factors")

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x)
        return linear_dynamic_int8(x, self.weight, self.scales, self.bias)  # type: ignore[no-any-return]


class RoundedLinear(HoldingLinear):
    """codes [out, bytes], steps [out, groups], zeros or None, bias or None; options bits and middle as in `rounded_linear`."""

    names = ("codes", "steps", "zeros", "bias", "factors")

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x)
        bits, middle = self.options["bits"], self.options["middle"]
        return rounded_linear(x, self.codes, self.steps, self.zeros, self.bias, bits, middle)  # type: ignore[no-any-return]


class RoundedRows(Holding):
    """codes [rows, bytes], steps [rows, groups], zeros or None; options bits, middle and channels."""

    names = ("codes", "steps", "zeros")

    def forward(self, ids: Tensor) -> Tensor:
        o = self.options
        return rounded_rows(  # type: ignore[no-any-return]
            ids, self.codes, self.steps, self.zeros, o["bits"], o["middle"], o["channels"]
        )


class Int8Rows(Holding):
    """weight int8 [rows, channels], scales [rows]; factors [channels] multiply the rows, where there are any."""

    names = ("weight", "scales", "factors")

    def forward(self, ids: Tensor) -> Tensor:
        return int8_rows(ids, self.weight, self.scales, self.factors)  # type: ignore[no-any-return]


class LowRankLinear(Holding):
    """(x down') up' + bias: down [r, in], up [out, r], bias [out] or None."""

    names = ("down", "up", "bias")

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up, self.bias)


class NarrowLinear(Holding):
    """weight [n, in], bias [n] or None; source [out]: which of the n each channel is, and n where it is zero. None: each is itself."""

    names = ("weight", "bias", "source")

    def forward(self, x: Tensor) -> Tensor:
        made = nn.functional.linear(x, self.weight, self.bias)
        return made if self.source is None else nn.functional.pad(made, (0, 1)).index_select(-1, self.source)


class PlainNorm(Holding):
    """weight, bias [D] or None; options kind: "layer" for the row less its mean by its deviation, "rms" by its root mean square; eps."""

    names = ("weight", "bias")

    def forward(self, x: Tensor) -> Tensor:
        shape, eps = x.shape[-1:], self.options["eps"]
        if self.options["kind"] == "layer":
            return nn.functional.layer_norm(x, shape, self.weight, self.bias, eps)
        return nn.functional.rms_norm(x, shape, self.weight, eps)


class CentredRows(nn.Embedding):
    """The rows of a table less their mean. It holds the parameter of the table that it stands for, which may be tied."""

    @classmethod
    def of(cls, table: nn.Embedding) -> CentredRows:
        made = cls(table.num_embeddings, table.embedding_dim, table.padding_idx, device="meta")
        made.weight = table.weight
        return made

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        return rows - rows.mean(-1, keepdim=True)


class NoAttention(nn.Module):
    """What is left of an attention that adds nothing: zeros, and one key of one channel for each token in the cache.

    transformers reads the length of a cache from its first layer, and a layer that never writes would tell 0.
    """

    def __init__(self, layer_idx: int | None) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        if past_key_values is not None and self.layer_idx is not None:
            place = torch.zeros(
                (hidden_states.shape[0], 1, hidden_states.shape[1], 1), dtype=hidden_states.dtype, device=hidden_states.device
            )
            past_key_values.update(place, place, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoNorm(nn.Module):
    """The norm of a sublayer that is gone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states
