"""Heads in a row or apart, and what a cache adds to keys and values: what all rules of fused attentions share.

[B, L, H*D]  <->  [B, H, L, D]          past [B, H, P, D], new [B, H, L, D]  ->  concat [B, H, P + L, D]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnopt.hosts.onnx.lengths import add
from attnopt.ir.dims import divide, product
from attnopt.ir.graph import Value

if TYPE_CHECKING:
    from attnopt.hosts.onnx.translate import Translation


def outputs_read(t: Translation, first: int) -> bool:
    """Whether anything reads the outputs from this one on."""
    return any(is_read(t, i) for i in range(first, len(t.node.outputs)))


def is_read(t: Translation, output: int) -> bool:
    """Whether anything reads this output."""
    outputs = t.node.outputs
    return output < len(outputs) and bool(outputs[output].uses() or outputs[output].is_graph_output())


def split_heads(t: Translation, value: Value, heads: int | None) -> Value | None:
    """[B, L, H*D] as [B, H, L, D]; None where the width is no multiple of the heads."""
    batch, length, width = value.shape or (0, 0, 0)
    each = divide(width, heads) if heads else None
    if each is None or heads is None:
        return None
    apart = t.emit("reshape", value, shape=(batch, length, heads, each))
    return t.emit("permute", apart, shape=(batch, heads, length, each), perm=(0, 2, 1, 3))


def merge_heads(t: Translation, value: Value) -> bool:
    """[B, H, L, D] as [B, L, H*D]: the output of the node."""
    batch, heads, length, width = value.shape or (0, 0, 0, 0)
    apart = t.emit("permute", value, shape=(batch, length, heads, width), perm=(0, 2, 1, 3))
    return t.result("reshape", apart, shape=(batch, length, product([heads, width])))


def part(t: Translation, value: Value, axis: int, start: int, stop: int, step: int = 1) -> Value:
    """value[…, start:stop:step, …] along one axis."""
    shape = value.shape or ()
    length = -(-(stop - start) // step)
    made = (*shape[:axis], length, *shape[axis + 1 :])
    return t.emit("slice", value, shape=made, axis=axis, start=start, stop=stop, step=step)


def joined(t: Translation, past: Value | None, new: Value, output: int | None = None) -> Value:
    """The keys or values to attend to: those of the past, then the new ones. The node's `output` holds the same, if read.

    The attention reads a concatenation of its own, so that what replaces it needs nothing of the old node.
    """
    if past is None or past.shape is None or new.shape is None:
        if output is not None and is_read(t, output):
            t.result("reshape", new, shape=new.shape, output=output)
        return new
    axis = len(new.shape) - 2
    whole = (*new.shape[:axis], add(past.shape[axis], new.shape[axis]), new.shape[-1])
    if output is not None and is_read(t, output):
        t.result("concat", past, new, shape=whole, output=output, axis=axis)
    return t.emit("concat", past, new, shape=whole, axis=axis)


def attend(t: Translation, q: Value, k: Value, v: Value, mask: Value | None, *, merged: bool, scale: float, **attrs: Any) -> bool:
    """The attention of q, k, v [B, H, L, D] as the node's first output, heads merged or apart."""
    assert q.shape is not None and v.shape is not None
    shape = (*q.shape[:-1], v.shape[-1])
    options = {"causal": False, "softcap": 0.0, **attrs, "scale": float(scale)}
    if not merged:
        return t.result("attention", q, k, v, mask, shape=shape, **options)
    return merge_heads(t, t.emit("attention", q, k, v, mask, shape=shape, **options))


def scale_of(t: Translation, q: Value) -> float | None:
    """The attribute, where it is given; one over the root of the head width else. Contrib operators write 0 for "not given"."""
    given, width = t.attr("scale"), (q.shape or ("",))[-1]
    if given:
        return float(given)
    return width**-0.5 if isinstance(width, int) else None
