"""LayerNormalization, RMSNormalization  ->  layer_norm, rms_norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnopt.hosts.onnx.rules.heads import outputs_read
from attnopt.hosts.onnx.rules.layout import Inputs, Rule
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation


def over_last_axis(t: Translation, value: Value | None) -> bool:
    return value is not None and value.shape is not None and t.attr("axis", -1) in (-1, len(value.shape) - 1)


def layer_norm(t: Translation, x: Inputs) -> bool:
    if not over_last_axis(t, x[0]) or outputs_read(t, 1):
        return False
    bias = x[2] if len(x) > 2 else None
    return t.result("layer_norm", x[0], x[1], bias, shape=x[0].shape, eps=float(t.attr("epsilon", 1e-5)))  # type: ignore[union-attr]


def rms_norm(t: Translation, x: Inputs) -> bool:
    if not over_last_axis(t, x[0]) or outputs_read(t, 1):
        return False
    return t.result("rms_norm", x[0], x[1], shape=x[0].shape, eps=float(t.attr("epsilon", 1e-5)))  # type: ignore[union-attr]


RULES: dict[str, Rule] = {
    "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm,
    "SimplifiedLayerNormalization": rms_norm,
}
