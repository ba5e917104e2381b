"""Norms of queries and keys as canonical nodes: what a block does to each head, written for other heads.

    x [B, H, L, D]   ->   x / sqrt(mean of squares + eps) * gain         over D; likewise layer norm and unit length

Every head is normalised by itself, so that heads which stay, or one that is pooled from several before it is normalised, need nothing but
their own gain. In half precision the norm is computed in float32, as models do.
"""

from __future__ import annotations

import torch

from attnopt.ir.block import HeadNorm, Norm
from attnopt.ir.graph import Value
from attnopt.ir.site import Builder, Refusal
from attnopt.passes.edits.caches.nodes import Nodes


def refuses_norm(step: HeadNorm, what: str, change: str) -> Refusal | None:
    """Why heads cannot be changed before this norm; None where they can. change: what does not pass through it, "" for what does."""
    if change:
        return Refusal(f"{what} are normalised by head, and {change} does not pass through the norm", step.norm.output.producer)
    if step.axis != "head":
        return Refusal(f"{what} are normalised over all heads together: fewer heads have another norm", step.norm.output.producer)
    if any(v is not None and v.load is None for v in (step.norm.weight, step.norm.bias)):
        return Refusal(f"the gain that {what} are normalised with is computed", step.norm.output.producer)
    if not bool((step.channels == step.channels[0]).all()):
        return Refusal(f"{what} are normalised with another gain in each head", step.norm.output.producer)
    return None


def normalized(builder: Builder, step: HeadNorm, x: Value) -> Value:
    """x [B, H', L, D] after the norm of its heads."""
    n, dtype = Nodes(builder), x.dtype
    made = whitened(n, step.norm, n.cast(x, "float32") if dtype in ("float16", "bfloat16") else x)
    for held, combine in ((step.norm.gain(), n.mul), (step.norm.offset(), n.add)):
        if held is not None:
            of_a_head = held[step.channels[0]]  # of all alike: `refuses_norm`
            made = combine(made, builder.constant(of_a_head.to(getattr(torch, made.dtype)), made.dtype))
    return n.cast(made, dtype)


def whitened(n: Nodes, norm: Norm, x: Value) -> Value:
    """Without gain and bias."""
    x = n.sub(x, n.reduced("mean", x)) if norm.kind == "layer" else x
    squares = n.reduced("sum" if norm.kind == "l2" else "mean", n.mul(x, x))
    if norm.floor:
        return n.div(x, n.binary("maximum", n.unary("sqrt", squares), norm.eps))
    return n.div(x, n.unary("sqrt", n.add(squares, norm.eps)))
