"""A model that is one attention, for each phase of generation: where the kernels of live layers are chosen, and what they are cut from.

prefill   q [B, H, L, D], k [B, G, L, D]      decode   q [B, H, 1, D], k [B, G, T, D]      B, L and T open

kernel(phase, spec, lowering)   ->   (q, k, v) -> ([B, H, Q, E],)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.codegen.lowering import Lowering
from attnopt.hosts.fx import FxHost, capture
from attnopt.hosts.module.layer_attention import AttentionCall, Called, Kernel
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.operators import in_python
from attnopt.patterns import recognise
from attnopt.plan.choose import emit

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for: heads of queries, keys and values, widths, dtype and kind of device."""

    heads: int
    key_heads: int
    value_heads: int
    width: int
    value_width: int
    dtype: str
    device: str = "cpu"

    @classmethod
    def of(cls, call: AttentionCall, device: str) -> Shape:
        return cls(call.heads, call.key_heads, call.value_heads, call.width, call.value_width, call.dtype, device)


class Products(nn.Module):
    """softmax(q k') v, whose spec is replaced by that of a layer."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ratio = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(ratio, 1) if ratio > 1 else x for x in (k, v))
        return (q @ k.mT).softmax(-1) @ v


def example(phase: str, shape: Shape, batch: int = 2, length: int = 96) -> dict[str, Tensor]:
    """Random q, k and v of one phase; the same numbers each time."""
    random = torch.Generator().manual_seed(length)
    queries = 1 if phase == DECODE else length
    sizes = {
        "q": (batch, shape.heads, queries, shape.width),
        "k": (batch, shape.key_heads, length, shape.width),
        "v": (batch, shape.value_heads, length, shape.value_width),
    }
    made = {name: torch.randn(size, generator=random) for name, size in sizes.items()}
    return {name: x.to(device=shape.device, dtype=getattr(torch, shape.dtype)) for name, x in made.items()}


@lru_cache(maxsize=16)
def opened(phase: str, shape: Shape) -> FxHost:
    """The attention with open sizes; a copy of it is edited."""
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2)
    rows = {0: batch} if phase == DECODE else {0: batch, 2: length}
    dims: dict[str, Any] = {"q": rows, "k": {0: batch, 2: length}, "v": {0: batch, 2: length}}
    return FxHost.from_captured(capture(Products().eval(), example(phase, shape), dims))


def site_of(host: FxHost, spec: AttentionSpec) -> Site:
    """The one attention of the host, as if it were the spec's."""
    (site,) = recognise(host.graph).sites
    spec = spec.with_(heads=site.spec.heads, width=site.spec.width)
    return replace(site, operands={}, tensor_form=None).with_step("layer", spec)


def kernel(phase: str, shape: Shape, spec: AttentionSpec, lowering: Lowering) -> Kernel:
    """(q, k, v) -> (output [B, H, Q, E],). Raises what a lowering raises for a spec that it does not take."""
    host = opened(phase, shape).copy()
    emit(host, site_of(host, spec), lowering)
    host.finish()
    for node in host.module.graph.nodes:
        node.meta = {}  # fake values and paths of modules, which would be copied with every model
    run = called(host.module)
    return host.module if run is None else Called(host.module, run)


def called(graph: Any) -> Kernel | None:
    """What the operator runs that is all of a graph of (q, k, v); None for other graphs."""
    given, calls = ([n for n in graph.graph.nodes if n.op == op] for op in ("placeholder", "call_function"))
    if len(calls) != 1 or calls[0].kwargs or list(calls[0].args[:3]) != given or graph.graph.output_node().args[0] != (calls[0],):
        return None
    run, rest = in_python(calls[0].target), [list(x) if isinstance(x, (list, tuple)) else x for x in calls[0].args[3:]]
    return None if run is None else lambda q, k, v: run(q, k, v, *rest)
