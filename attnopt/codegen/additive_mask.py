"""Mask and biases of a spec as the one tensor that library kernels take.

    add(load(bias0, …)) … mask & empty(mean)   ->   where(mask, bias, half of the smallest finite)      float, added to the scores
    mask alone with empty(zero)                ->   the bool mask itself

Filling with a finite number makes a row without visible key average v: half of the smallest, because onnxruntime's Attention
takes the smallest itself for minus infinity, which makes kernels return zero (or NaN: MultiHeadAttention).
"""

from __future__ import annotations

import torch

from attnopt.codegen.materialize import Materializer, as_dtype, broadcast, shape_of, writable
from attnopt.ir.expr import Const
from attnopt.ir.graph import Value
from attnopt.ir.site import Builder, Refusal, Site


def plain_softmax(site: Site) -> Refusal | None:
    """None where the spec is softmax over scaled products plus biases under a mask, and nothing more."""
    spec = site.spec
    if site.weights_used is not None:
        return Refusal("the attention weights themselves are read here, and a fused kernel never makes them", site.weights_used)
    special = [slot for slot in spec.special if slot != "offset" or not held(site)]
    if special:
        return Refusal(f"{special[0]} is not part of this kernel", site.name)
    if spec.heads is not None and spec.heads.operand("map") is not None:
        return Refusal("query heads are mapped to key heads by a table", site.name)
    if spec.normalizer.name != "softmax":
        return Refusal(f"the normaliser is {spec.normalizer}, not softmax", site.name)
    return None


def scaled_then_biased(site: Site, *, softcap: bool = False) -> Refusal | None:
    """None where the score terms are: constant scales, then (if allowed) one soft cap, then biases that can be written."""
    if (refusal := plain_softmax(site)) is not None:
        return refusal
    names = [clause.name for clause in site.spec.score]
    rest = names[sum(name == "scale" for name in names[:1]) :]
    if site.spec.scale is None:
        return Refusal("the scale is a tensor", site.name)
    if softcap and rest[:1] == ["softcap"]:
        rest = rest[1:]
    if any(name != "add" for name in rest):
        return Refusal(f"score terms '{' '.join(map(str, site.spec.score))}' do not fit scale, then bias", site.name)
    if held(site):
        return None
    exprs = [*site.spec.biases, site.spec.mask]
    return next((r for e in exprs if (r := writable(e, site)) is not None), None)


def held(site: Site) -> bool:
    """Whether the graph holds exactly these biases and this mask as tensors already."""
    return site.tensor_form is not None and site.tensor_form.says(site.spec)


def additive_mask(site: Site, builder: Builder, *, boolean: bool) -> Value | None:
    """One tensor [B|1, H|1, Q|1, K|1] to add to the scores, or a bool mask where `boolean` kernels take one; None for none.

    What the graph holds already is read, not made again.
    """
    form = site.tensor_form if held(site) else None
    mask = site.spec.mask if form is None else form.mask
    biases = site.spec.biases if form is None else form.biases
    empty_row = site.spec.empty_row if form is None else form.empty_row
    dtype = site.q.value.dtype
    writer = Materializer(site, builder, dtype)
    biases = tuple(e for e in biases if not isinstance(e, Const))  # a constant shift changes no softmax
    unmasked = site.spec.mask is None and all(isinstance(e, Const) for e in site.spec.biases)
    if unmasked or (mask is None and not biases):
        return None
    if mask is not None and not biases and boolean and empty_row != "mean":
        return writer.write(mask)
    total: Value | None = None
    for bias in biases:
        value = as_dtype(writer.write(bias), dtype, builder)
        total = (
            value
            if total is None
            else builder.emit("add", total, value, shape=broadcast(shape_of(total), shape_of(value)), dtype=dtype)
        )
    if mask is None:
        return total
    visible = writer.write(mask)
    kept = total if total is not None else builder.constant(0.0, dtype)
    lowest = torch.finfo(getattr(torch, dtype)).min / 2 if empty_row == "mean" else float("-inf")
    return builder.emit(
        "where", visible, kept, builder.constant(lowest, dtype), shape=broadcast(shape_of(visible), shape_of(kept)), dtype=dtype
    )
