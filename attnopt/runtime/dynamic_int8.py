"""attnopt::linear_dynamic_int8: a linear layer whose weight is int8 and whose input is quantised for each call.

    y = (q(x) W_int8') * s_x * s_w + b          s_w per output channel, symmetric;  s_x and zero point per call
    rows = W_int8[ids] * s_w[ids] * f           attnopt::int8_rows: a table that is tied to the layer, looked up in its codes

torch's own dynamically quantised kernel computes it. The packed form of a weight is made once and kept as long as the weight.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

PACKED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A float weight [out, in] as int8 [out, in] and one float32 scale per output channel [out]."""
    scales = (weight.abs().amax(1) / 127.0).clamp(min=torch.finfo(torch.float32).tiny).float()
    stored = torch.round(weight.float() / scales[:, None]).clamp(-127, 127).to(torch.int8)
    return stored, scales


def packed(weight: Tensor, scales: Tensor, bias: Tensor | None) -> Any:
    known = PACKED.get(weight)
    if known is None:
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():  # torch announces the end of quantised tensors; its kernels still take nothing else
            warnings.simplefilter("ignore")
            quantized = torch._make_per_channel_quantized_tensor(weight, scales.double(), zeros, 0)
        known = torch.ops.quantized.linear_prepack(quantized, bias)
        PACKED[weight] = known
    return known


@torch.library.custom_op("attnopt::linear_dynamic_int8", mutates_args=())
def linear_dynamic_int8(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x float32 [..., in], weight int8 [out, in], scales float32 [out], bias float32 [out] or None -> float32 [..., out]."""
    return torch.ops.quantized.linear_dynamic(x, packed(weight, scales, bias))  # type: ignore[no-any-return]


@linear_dynamic_int8.register_fake
def _(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("attnopt::int8_rows", mutates_args=())
def int8_rows(ids: Tensor, weight: Tensor, scales: Tensor, factors: Tensor | None) -> Tensor:
    """Rows ids [...] of a table, weight int8 [rows, channels], scales float32 [rows], factors [channels] or None -> [..., channels]."""
    rows = weight[ids] * scales[ids][..., None]
    return rows if factors is None else rows * factors


@int8_rows.register_fake
def _(ids: Tensor, weight: Tensor, scales: Tensor, factors: Tensor | None) -> Tensor:
    return scales.new_empty((*ids.shape, weight.shape[1]))
