"""softmax heads(8, 2) scale(s) causal & window(512) & padding   ->   index, aten.scaled_dot_product_attention on chunks

torch's kernel on chunks of queries, each beside the keys that the mask's band reaches: chunks are its batch. Against FlexAttention
it needs no compiler, averages empty rows where the spec says so, and starts at once; FlexAttention has soft caps and is a little
faster where it can be had.

    q [B·N, H, C, D], k [B·N, G, M, D], v [B·N, G, M, E], mask [B·N, 1|H, C, M]

Source: "Longformer: The Long-Document Transformer" (sliding chunks).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnopt.codegen.additive_mask import scaled_then_biased
from attnopt.codegen.local_writer import LocalWriter, in_chunks
from attnopt.codegen.lowering import first_refusal
from attnopt.codegen.materialize import shape_of
from attnopt.ir.dims import Dim, product
from attnopt.ir.expr import Const
from attnopt.ir.graph import Value
from attnopt.ir.layout import Group
from attnopt.ir.site import Builder, Refusal, Site, arrange


@dataclass(frozen=True)
class LocalSdpa:
    name: str = "local-sdpa"
    host: str = "torch"
    opset: int = 0

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        return (
            first_refusal(
                (runtime == "torch", f"runtime {runtime} has no scaled_dot_product_attention"),
                at=site.name,
            )
            or in_chunks(site)
            or scaled_then_biased(site)
        )

    def emit(self, site: Site, builder: Builder) -> Value:
        write, a = LocalWriter(site, builder), site.axes
        b, g, n, r, c, j = write.grid.sizes
        e, heads = site.size("e"), product([g, r])
        q = chunked(write, arrange(builder, site.q, [a["b"], a["q"], (*a["g"], *a["r"]), a["d"]], broadcast=True), "rows")
        k, v = (arrange(builder, x, keys(site, width), broadcast=True) for x, width in ((site.k, "d"), (site.v, "e")))
        mask = write.mask()
        biased = mask
        for bias in site.spec.biases:
            if not isinstance(bias, Const):  # a constant shift changes no softmax
                biased = write.binary("add", biased, write.score_term(bias))
        out = builder.call(
            torch.ops.aten.scaled_dot_product_attention.default,
            q,
            chunked(write, k, "keys"),
            chunked(write, v, "keys"),
            by_chunk(write, biased),
            shape=(product([b, n]), heads, c, e),
            dtype=write.dtype,
            scale=site.spec.scale,
            enable_gqa=bool(a["r"]),
        )
        out = write.moved(write.emit("reshape", out, shape=(b, n, g, r, c, e)), 0, 2, 1, 3, 4, 5)
        return write.finish(out, mask, write.moved(v, 0, 2, 1, 3))


def keys(site: Site, width: str) -> list[Group]:
    return [site.axes["b"], site.axes["k"], site.axes["g"], site.axes[width]]


def chunked(write: LocalWriter, value: Value, by: str) -> Value:
    """[B, L, H, D] gathered by chunk and turned: [B·N, H, C|M, D]."""
    b, n, length, heads, width = shape_of(gathered := write.grid.gather(value, 1, by))
    return write.moved(write.emit("reshape", gathered, shape=(product([b, n]), length, heads, width)), 0, 2, 1, 3)


def by_chunk(write: LocalWriter, mask: Value) -> Value:
    """[B|1, G|1, N, R|1, C, M] as [B·N, 1|H, C, M]: the kernel broadcasts heads but not a part of its batch."""
    b, g, n, r, c, j = write.grid.sizes
    each_head = any(size != 1 for size in (shape_of(mask)[1], shape_of(mask)[3]))
    wanted: tuple[Dim, ...] = (b, g if each_head else 1, n, r if each_head else 1, c, j)
    if shape_of(mask) != wanted:
        mask = write.emit("expand", mask, shape=wanted)
    heads = product([wanted[1], wanted[3]])
    return write.emit("reshape", write.moved(mask, 0, 2, 1, 3, 4, 5), shape=(product([b, n]), heads, c, j))
