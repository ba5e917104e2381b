"""The traceable part of models that torch.export cannot follow as a whole.

Longformer and LED ask in Python whether any token attends globally, and divide lengths by `torch.div`, which makes numbers into data.
Their attention is measured by itself: one layer, without global tokens, its lengths divided as numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class WholeDivision(TorchFunctionMode):
    """torch.div(12, 6, rounding_mode="trunc") is 2, not a tensor."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.div and not any(isinstance(a, Tensor) for a in args):
            return args[0] // args[1]
        return func(*args, **(kwargs or {}))


class WindowedLayer(nn.Module):
    """hidden_states [B, L, D], attention_mask [B, L] (0 to attend, -10000 for padding) -> what the layer gives."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Any:
        with WholeDivision():
            return self.layer(
                hidden_states,
                attention_mask=attention_mask,
                is_index_masked=attention_mask < 0,
                is_index_global_attn=attention_mask > 0,
                is_global_attn=False,
            )
