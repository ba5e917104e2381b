"""layer_norm, rms_norm, scaled_dot_product_attention  ->  layer_norm, rms_norm, attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnopt.hosts.fx.rules.layout import Arguments, Rule

if TYPE_CHECKING:
    from attnopt.hosts.fx.translate import Translation


def layer_norm(t: Translation, a: Arguments) -> bool:
    if len(a["normalized_shape"]) != 1:
        return False
    return t.result("layer_norm", t.value(a["input"]), t.value(a["weight"]), t.value(a["bias"]), eps=a["eps"])


def rms_norm(t: Translation, a: Arguments) -> bool:
    """Without an eps torch takes that of the type it calculates in: halves are calculated as float32."""
    x = t.value(a["input"])
    if len(a["normalized_shape"]) != 1 or x is None:
        return False
    eps = a["eps"] if a["eps"] is not None else torch.finfo(torch.float64 if x.dtype == "float64" else torch.float32).eps
    return t.result("rms_norm", x, t.value(a["weight"]), eps=eps)


def attention(t: Translation, a: Arguments) -> bool:
    """Heads repeat where `enable_gqa` is set; the default scale is one over the root of the head width."""
    q, k, v, mask = (t.value(a[name]) for name in ("query", "key", "value", "attn_mask"))
    if q is None or q.shape is None or len(q.shape) not in (3, 4) or not isinstance(q.shape[-1], int) or a["dropout_p"]:
        return False
    scale = a["scale"] if a["scale"] is not None else q.shape[-1] ** -0.5
    if not isinstance(scale, (int, float)):
        return False
    return t.result("attention", q, k, v, mask, causal=bool(a["is_causal"]), scale=float(scale), softcap=0.0)


RULES: dict[str, Rule] = {
    "aten.layer_norm": layer_norm,
    "aten.rms_norm": rms_norm,
    "aten.scaled_dot_product_attention": attention,
}
