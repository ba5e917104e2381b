"""softmax heads(8, 2) scale(s) causal & window(512) & padding   ->   Gather, MatMul, Add, Softmax, MatMul on chunks

Where the mask proves a band, each chunk of queries needs only the keys beside it: time and memory grow with the length, not
with its square, in standard operators that every ONNX runtime has. With C rows a chunk and M = C + band - 1 keys beside it:

    q [B, G, N, R·C, D] · k [B, G, N, M, D]'  ->  [B, G, N, R, C, M], + mask, softmax, · v [B, G, N, M, E]

Grouped key heads are not repeated: the R query heads of a group are rows of one product. The rest of the mask (padding,
documents, …) and the biases are written on the same grid.

Source: "Longformer: The Long-Document Transformer" (sliding chunks), with one gather instead of overlapping views.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnopt.codegen.additive_mask import as_dtype, plain_softmax
from attnopt.codegen.band import Band, band, follows_distance
from attnopt.codegen.chunk_writer import ChunkWriter, on_chunks
from attnopt.codegen.chunks import ChunkGrid, chunking
from attnopt.codegen.library.flex import never_empty
from attnopt.codegen.lowering import first_refusal
from attnopt.codegen.materialize import broadcast, shape_of
from attnopt.ir.clause import Clause
from attnopt.ir.dims import Dim, Shape, product
from attnopt.ir.expr import Term, conjuncts
from attnopt.ir.graph import Value
from attnopt.ir.layout import Operand
from attnopt.ir.site import Builder, Refusal, Site, arrange

SCORE_TERMS = ("scale", "softcap", "add")


@dataclass(frozen=True)
class LocalAttention:
    name: str = "local-attention"
    host: str = "onnx"
    opset: int = 13

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        spec, length = site.spec, site.size("k")
        found = band(spec.mask)
        unknown = [c for c in spec.score if c.name not in SCORE_TERMS]
        exprs = [spec.mask, *(c.expr(0) for c in spec.score if c.name in ("scale", "add"))]
        return (
            first_refusal(
                (found is not None, f"mask '{spec.mask}' proves no window on both sides of a query"),
                (isinstance(site.size("g"), int) and isinstance(site.size("r"), int), "the number of heads is not known"),
                (site.q.value.dtype in ("float32", "float16", "float64"), f"dtype {site.q.value.dtype}"),
                (spec.offset is None, "queries do not start at position 0"),
                (site.size("q") == length, "queries and keys differ in number"),
                (spec.scale is not None, "a tensor stands first among the scales"),
                (not unknown, f"score term '{next(iter(unknown), '')}'"),
                at=site.name,
            )
            or plain_softmax(site)
            or shorter_than_window(found, length, site)
            or next((r for e in exprs if (r := on_chunks(e, site)) is not None), None)
        )

    def emit(self, site: Site, builder: Builder) -> Value:
        found = band(site.spec.mask)
        assert found is not None
        return LocalWriter(site, builder, found).write()


def shorter_than_window(found: Band | None, length: Dim, site: Site) -> Refusal | None:
    if found is None or not isinstance(length, int) or chunking(found).keys < length:
        return None
    return Refusal(f"the window and a chunk cover all {length} keys", site.name)


class LocalWriter:
    """Writes one site; dimensions are named as in `ChunkGrid.sizes`, d and e are the widths of keys and values."""

    def __init__(self, site: Site, builder: Builder, found: Band) -> None:
        self.site, self.builder, self.dtype = site, builder, site.q.value.dtype
        self.grid = ChunkGrid(site, builder, chunking(found))
        self.writer = ChunkWriter(site, builder, self.dtype, grid=self.grid)
        self.nearby = ChunkWriter(site, builder, self.dtype, grid=self.grid, relative=True)

    def write(self) -> Value:
        a = self.site.axes
        b, g, n, r, c, j = self.grid.sizes
        d, e, rows = self.site.size("d"), self.site.size("e"), product([r, c])
        leading = self.site.spec.scale
        q = arrange(self.builder, self.site.q, [a["b"], a["g"], a["r"], a["q"], a["d"]], broadcast=True)
        k = arrange(self.builder, self.site.k, [a["b"], a["g"], a["k"], a["d"]], broadcast=True)
        v = arrange(self.builder, self.site.v, [a["b"], a["g"], a["k"], a["e"]], broadcast=True)
        if leading is not None and leading != 1.0:
            q = self.binary("mul", q, self.number(leading))
        queries = self.moved(self.grid.gather(q, 3, "rows"), 0, 1, 3, 2, 4, 5)
        queries = self.emit("reshape", queries, shape=(b, g, n, rows, d))
        keys = self.moved(self.grid.gather(k, 2, "keys"), 0, 1, 2, 4, 3)
        values = self.grid.gather(v, 2, "keys")
        scores = self.emit("matmul", queries, keys, shape=(b, g, n, rows, j))
        scores = self.emit("reshape", scores, shape=(b, g, n, r, c, j))
        for clause in after_scales(self.site.spec.score):
            scores = self.term(scores, clause)
        mask = self.mask()
        weights = self.emit("softmax", self.binary("add", scores, mask), shape=(b, g, n, r, c, j), axis=5)
        weights = self.emit("reshape", weights, shape=(b, g, n, rows, j))
        output = self.emit("matmul", weights, values, shape=(b, g, n, rows, e))
        output = self.emit("reshape", output, shape=(b, g, n, r, c, e))
        if self.may_be_empty and self.site.spec.empty_row != "free":
            output = self.fill_empty(output, mask, v)
        output = self.emit("reshape", self.moved(output, 0, 1, 3, 2, 4, 5), shape=(b, g, r, product([n, c]), e))
        layout = (a["b"], a["g"], a["r"], a["q"], a["e"])
        return arrange(self.builder, Operand(self.real_rows(output), layout), self.site.output.layout)

    def term(self, scores: Value, clause: Clause) -> Value:
        """One clause of the score, applied."""
        if clause.name == "softcap":
            cap = self.number(clause.number(0))
            squashed = self.emit("tanh", self.binary("div", scores, cap), shape=shape_of(scores))
            return self.binary("mul", squashed, cap)
        expr = clause.expr(0)
        writer = self.nearby if follows_distance(expr) else self.writer
        return self.binary(
            "mul" if clause.name == "scale" else "add", scores, as_dtype(writer.write(expr), self.dtype, self.builder)
        )

    @property
    def may_be_empty(self) -> bool:
        return not never_empty(self.site)

    def mask(self) -> Value:
        """0 where a query sees a key and minus infinity elsewhere, [B|1, G|1, N, R|1, C, M].

        What follows the distance is one tile for all chunks. It is added to the rest as numbers: one pass over the large shape.
        """
        blocks = Term("chunk", (self.grid.chunks.rows,)) if self.grid.chunks.behind == 0 else None
        parts = [p for p in conjuncts(self.site.spec.mask) if p != blocks]
        near = [self.nearby.truth(p) for p in parts if follows_distance(p)]
        far = [self.grid.once("inside"), *(self.writer.truth(p) for p in parts if not follows_distance(p))]
        by_size = sorted(far, key=lambda value: sum(size != 1 for size in shape_of(value)))
        hidden = [self.hide(values) for values in (near, by_size) if values]
        return functools.reduce(lambda x, y: self.binary("add", x, y), hidden)

    def hide(self, conditions: Sequence[Value]) -> Value:
        """0 where all conditions hold. Where empty rows are free, twice the other number is still finite, so that they hold no NaN."""
        visible = functools.reduce(lambda x, y: self.binary("and", x, y, "bool"), conditions)
        free = self.may_be_empty and self.site.spec.empty_row == "free"
        hidden = torch.finfo(getattr(torch, self.dtype)).min / 2 if free else -math.inf
        return self.emit("where", visible, self.number(0.0), self.number(hidden), shape=shape_of(visible), dtype=self.dtype)

    def fill_empty(self, output: Value, mask: Value, v: Value) -> Value:
        """Rows that see no key get the mean over all values, or zero."""
        b, g, _, _, _, _ = self.grid.sizes
        e = self.site.size("e")
        most = self.emit("reduce_max", mask, shape=(*shape_of(mask)[:5], 1), axes=(5,), keepdims=True)
        empty = self.binary("eq", most, self.number(-math.inf), "bool")
        filling = self.number(0.0)
        if self.site.spec.empty_row == "mean":
            filling = self.emit("reduce_mean", v, shape=(b, g, 1, e), axes=(2,), keepdims=True)
            filling = self.emit("reshape", filling, shape=(b, g, 1, 1, 1, e))
        return self.emit("where", empty, filling, output, shape=shape_of(output), dtype=self.dtype)

    def real_rows(self, output: Value) -> Value:
        """[B, G, R, N·C, E] without the rows that filled the last chunk."""
        b, g, r, padded, e = shape_of(output)
        length = self.site.size("q")
        if padded == length:
            return output
        if isinstance(length, int):
            return self.emit("slice", output, shape=(b, g, r, length, e), axis=3, start=0, stop=length, step=1)
        return self.emit("gather", output, self.grid.once("every"), shape=(b, g, r, length, e), axis=3)

    # Below: nodes.

    def emit(self, op: str, *inputs: Value, shape: Shape, dtype: str = "", **attrs: Any) -> Value:
        return self.builder.emit(op, *inputs, shape=shape, dtype=dtype or inputs[0].dtype, **attrs)

    def binary(self, op: str, a: Value, b: Value, dtype: str = "") -> Value:
        return self.emit(op, a, b, shape=broadcast(shape_of(a), shape_of(b)), dtype=dtype)

    def moved(self, value: Value, *perm: int) -> Value:
        return self.emit("permute", value, shape=tuple(shape_of(value)[i] for i in perm), perm=perm)

    def number(self, value: float) -> Value:
        return self.builder.constant(value, self.dtype)


def after_scales(score: Sequence[Clause]) -> tuple[Clause, ...]:
    """The terms after the constant scales that stand first, which `spec.scale` holds."""
    first = next((i for i, c in enumerate(score) if c.name != "scale"), len(score))
    return tuple(score[first:])
