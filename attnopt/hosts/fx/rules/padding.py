"""pad(x, (1, 2), value=0.0)   ->   concat(full 0.0 of 1, x, full 0.0 of 2), one axis after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnopt.hosts.fx.rules.access import replaced
from attnopt.hosts.fx.rules.layout import Arguments
from attnopt.ir.dims import Dim
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.fx.translate import Translation


def pad(t: Translation, a: Arguments) -> bool:
    """With one number, by sizes that are known not to be negative (a negative one crops). The last axis comes first."""
    value, amounts = t.value(a["self"]), list(a["pad"])
    filling = 0.0 if a["value"] is None else a["value"]
    filled = a.get("mode", "constant") == "constant" and isinstance(filling, (bool, int, float))
    if value is None or value.shape is None or not filled or not all(map(not_negative, amounts)):
        return False
    rank, result = len(value.shape), t.shape
    sides = {rank - 1 - i // 2: amounts[i : i + 2] for i in range(0, len(amounts), 2)}
    wide = {axis: around for axis, around in sides.items() if any(not isinstance(n, int) or n for n in around)}
    for axis, (before, after) in wide.items():
        pieces = [margin(t, value, axis, before, filling), value, margin(t, value, axis, after, filling)]
        joined = [piece for piece in pieces if piece is not None]
        if axis == list(wide)[-1]:
            return t.result("concat", *joined, axis=axis)
        value = t.emit("concat", *joined, shape=replaced(value, axis, result[axis]), axis=axis)
    return t.same(value)


def margin(t: Translation, value: Value, axis: int, amount: Any, filling: float) -> Value | None:
    size: Dim = t.dim(amount)
    return None if size == 0 else t.emit("full", shape=replaced(value, axis, size), dtype=value.dtype, value=filling)


def not_negative(amount: Any) -> bool:
    if isinstance(amount, int):
        return amount >= 0
    held = amount.meta.get("val") if isinstance(amount, fx.Node) else None
    return isinstance(held, torch.SymInt) and bool(held.node.shape_env.bound_sympy(held.node.expr).lower >= 0)


RULES = {"aten.pad": pad, "aten.constant_pad_nd": pad}
