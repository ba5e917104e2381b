"""What every form of local attention shares: the mask on the grid of chunks, empty rows, and the way back to whole rows.

mask      [B|1, G|1, N, R|1, C, M]    0 where a query sees a key, minus infinity elsewhere
output    [B, G, N, R, C, E]          ->    the layout of the site's output
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from attnopt.codegen.additive_mask import as_dtype
from attnopt.codegen.chunk_writer import ChunkWriter
from attnopt.codegen.chunks import ChunkGrid
from attnopt.codegen.lowering import first_refusal
from attnopt.codegen.materialize import broadcast, shape_of
from attnopt.ir.band import Band, band, chunking, follows_distance
from attnopt.ir.dims import Shape, product
from attnopt.ir.empty_rows import never_empty
from attnopt.ir.expr import Expr, Term, conjuncts
from attnopt.ir.graph import Value
from attnopt.ir.layout import Operand
from attnopt.ir.site import Builder, Refusal, Site, arrange


def worth_chunks(site: Site) -> Refusal | None:
    """None where the mask proves a band on both sides of a query that is narrower than the keys are many."""
    length, found = site.size("k"), band(site.spec.mask)
    return first_refusal(
        (found is not None, f"mask '{site.spec.mask}' proves no window on both sides of a query"),
        (site.spec.offset is None, "queries do not start at position 0"),
        (site.size("q") == length, "queries and keys differ in number"),
        (
            found is None or not isinstance(length, int) or chunking(found).keys < length,
            f"the window and a chunk cover all {length} keys",
        ),
        at=site.name,
    )


class LocalWriter:
    """Writes one site; dimensions are named as in `ChunkGrid.sizes`, d and e are the widths of keys and values."""

    def __init__(self, site: Site, builder: Builder) -> None:
        self.site, self.builder, self.dtype = site, builder, site.q.value.dtype
        self.grid = ChunkGrid(site, builder, chunking(band(site.spec.mask) or Band(0, 0)))
        self.writer = ChunkWriter(site, builder, self.dtype, grid=self.grid)
        self.nearby = ChunkWriter(site, builder, self.dtype, grid=self.grid, relative=True)

    def score_term(self, expr: Expr) -> Value:
        """A bias or factor on the grid; what follows the distance is one tile for all chunks."""
        writer = self.nearby if self.is_tile(expr) else self.writer
        return as_dtype(writer.write(expr), self.dtype, self.builder)

    def is_tile(self, expr: Expr) -> bool:
        """Whether the expression is alike in all chunks: the first keys of the sequence lie at another distance from each."""
        return self.grid.chunks.first == 0 and follows_distance(expr)

    @property
    def may_be_empty(self) -> bool:
        return not never_empty(self.site)

    def mask(self) -> Value:
        """0 where a query sees a key and minus infinity elsewhere, [B|1, G|1, N, R|1, C, M].

        What follows the distance is one tile for all chunks. It is added to the rest as numbers: one pass over the large shape.
        """
        blocks = Term("chunk", (self.grid.chunks.rows,)) if self.grid.chunks.behind == 0 else None
        parts = [p for p in conjuncts(self.site.spec.mask) if p != blocks]
        near = [self.nearby.truth(p) for p in parts if self.is_tile(p)]
        far = [self.grid.once("inside"), *(self.writer.truth(p) for p in parts if not self.is_tile(p))]
        by_size = sorted(far, key=lambda value: sum(size != 1 for size in shape_of(value)))
        hidden = [self.hide(values) for values in (near, by_size) if values]
        return functools.reduce(lambda x, y: self.binary("add", x, y), hidden)

    def hide(self, conditions: Sequence[Value]) -> Value:
        """0 where all conditions hold. Where empty rows are free, twice the other number is still finite, so that they hold no NaN."""
        visible = functools.reduce(lambda x, y: self.binary("and", x, y, "bool"), conditions)
        free = self.may_be_empty and self.site.spec.empty_row == "free"
        hidden = torch.finfo(getattr(torch, self.dtype)).min / 2 if free else -math.inf
        return self.emit("where", visible, self.number(0.0), self.number(hidden), shape=shape_of(visible), dtype=self.dtype)

    def finish(self, output: Value, mask: Value, v: Value) -> Value:
        """[B, G, N, R, C, E] in the layout of the site's output; v is [B, G, K, E]."""
        a = self.site.axes
        b, g, n, r, c, _ = self.grid.sizes
        e = self.site.size("e")
        if self.may_be_empty and self.site.spec.empty_row != "free":
            output = self.fill_empty(output, mask, v)
        output = self.emit("reshape", self.moved(output, 0, 1, 3, 2, 4, 5), shape=(b, g, r, product([n, c]), e))
        layout = (a["b"], a["g"], a["r"], a["q"], a["e"])
        return arrange(self.builder, Operand(self.real_rows(output), layout), self.site.output.layout)

    def fill_empty(self, output: Value, mask: Value, v: Value) -> Value:
        """Rows that see no key get the mean over all values, or zero."""
        b, g, *_ = self.grid.sizes
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
        return self.emit("slice", output, shape=(b, g, r, length, e), axis=3, start=0, stop=length, step=1)

    # Below: nodes.

    def emit(self, op: str, *inputs: Value, shape: Shape, dtype: str = "", **attrs: Any) -> Value:
        return self.builder.emit(op, *inputs, shape=shape, dtype=dtype or inputs[0].dtype, **attrs)

    def binary(self, op: str, a: Value, b: Value, dtype: str = "") -> Value:
        return self.emit(op, a, b, shape=broadcast(shape_of(a), shape_of(b)), dtype=dtype)

    def moved(self, value: Value, *perm: int) -> Value:
        return self.emit("permute", value, shape=tuple(shape_of(value)[i] for i in perm), perm=perm)

    def number(self, value: float) -> Value:
        return self.builder.constant(value, self.dtype)
