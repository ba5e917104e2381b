"""DequantizeLinear of stored numbers  ->  the constant that it is. Of anything computed it stays opaque.

DequantizeLinear(weight_int8, scale [N], zero [N], axis=1)   ->   (weight_int8 - zero) * scale, read when asked
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnopt.hosts.onnx.rules.layout import Inputs, Rule
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation


def dequantize(t: Translation, x: Inputs) -> bool:
    stored, scale, zero = (*x, None)[:3]
    if stored is None or scale is None or stored.load is None or scale.load is None or (zero is not None and zero.load is None):
        return False
    if not stored.dtype or stored.shape is None or len(scale.shape or ()) > 1 or t.attr("block_size", 0):
        return False
    axis = int(t.attr("axis", 1))
    held = t.node.outputs[0]
    value = Value(held.name or "", stored.shape, scale.dtype, handle=held)
    value.load = lambda: restored(stored, scale, zero, axis)
    t.values[held] = value
    return True


def restored(stored: Value, scale: Value, zero: Value | None, axis: int) -> Tensor:
    assert stored.load is not None and scale.load is not None
    numbers, steps = stored.load(), scale.load()
    shape = [-1 if i == axis % max(numbers.ndim, 1) else 1 for i in range(numbers.ndim)] if steps.numel() > 1 else []
    shift = zero.load().reshape(shape) if zero is not None and zero.load is not None else torch.zeros((), dtype=numbers.dtype)
    return (numbers.to(steps.dtype) - shift.to(steps.dtype)) * steps.reshape(shape)


RULES: dict[str, Rule] = {"DequantizeLinear": dequantize}
