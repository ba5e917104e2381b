"""Queries in chunks, each beside the keys that its band reaches: the grid on which local attention is written.

    rows 0 … L-1     ->   chunk n, row c           row n·C + c
    keys of chunk n  ->   place j of M             key n·C - behind + j, held inside 0 … L-1
    with `first`     ->   its first places         keys 0 … first-1, but those that stand among the others already

The grid is [B, N, C, M] with heads apart, as six dimensions (b, g, n, r, c, j). One gather along the length serves whatever is
indexed by it (keys, values, padding, biases); places that were held inside are taken out by the mask. Where the mask keeps
blocks apart, the chunks are the blocks and see only themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from attnopt.codegen.materialize import broadcast, shape_of
from attnopt.ir.band import Chunking
from attnopt.ir.dims import Dim, symbol
from attnopt.ir.graph import Value
from attnopt.ir.site import Builder, Site


@dataclass
class ChunkGrid:
    """The positions of one site's chunks as values, each written once."""

    site: Site
    builder: Builder
    chunks: Chunking
    held: dict[str, Value] = field(default_factory=dict)

    @property
    def length(self) -> Dim:
        return self.site.size("k")

    @property
    def count(self) -> Dim:
        """How many chunks: the length divided by their rows, rounded up."""
        rows = self.chunks.rows
        if isinstance(self.length, int):
            return -(-self.length // rows)
        return symbol(f"({self.length} + {rows - 1}) / {rows}".replace("*", "·"))

    @property
    def sizes(self) -> tuple[Dim, ...]:
        """(b, g, n, r, c, j)."""
        b, g, r = (self.site.size(axis) for axis in "bgr")
        return b, g, self.count, r, self.chunks.rows, self.chunks.keys

    def number(self, value: int) -> Value:
        return self.builder.constant(value, "int64")

    def count_up(self, size: Dim, start: int = 0, step: int = 1) -> Value:
        return self.builder.emit("iota", shape=(size,), dtype="int64", start=start, step=step)

    def binary(self, op: str, a: Value, b: Value, dtype: str = "int64") -> Value:
        return self.builder.emit(op, a, b, shape=broadcast(shape_of(a), shape_of(b)), dtype=dtype)

    def once(self, name: str) -> Value:
        if name not in self.held:
            self.held[name] = getattr(self, f"write_{name}")()
        return self.held[name]

    def write_last(self) -> Value:
        """The last key, []."""
        if isinstance(self.length, int):
            return self.number(self.length - 1)
        return self.builder.emit("reduce_max", self.once("every"), shape=(), dtype="int64", axes=(0,), keepdims=False)

    def write_every(self) -> Value:
        """0 … L-1, [L]."""
        return self.count_up(self.length)

    def write_length(self) -> Value:
        """How many keys there are, []."""
        return self.binary("add", self.once("last"), self.number(1))

    def write_first(self) -> Value:
        """The first row of every chunk, [N, 1]."""
        rows, count = self.chunks.rows, self.count
        if isinstance(count, int):
            starts = self.count_up(count, step=rows)
        else:
            bounds = {"axis": 0, "start": 0, "stop": None, "step": rows}
            starts = self.builder.emit("slice", self.once("every"), shape=(count,), dtype="int64", **bounds)
        return self.builder.emit("reshape", starts, shape=(count, 1), dtype="int64")

    def write_rows(self) -> Value:
        """The row at (n, c), the last one repeated, [N, C]."""
        offsets = self.count_up(self.chunks.rows)
        return self.binary("minimum", self.binary("add", self.once("first"), offsets), self.once("last"))

    def write_places(self) -> Value:
        """The key at (n, j), also outside of 0 … L-1, [N, M]."""
        chunks = self.chunks
        beside = chunks.keys - chunks.first
        near = self.binary("add", self.once("first"), self.count_up(beside, -chunks.behind))
        if chunks.first == 0:
            return near
        lowest = self.binary("add", self.once("first"), self.number(-chunks.behind))
        sinks = self.builder.emit("reshape", self.count_up(chunks.first), shape=(1, chunks.first), dtype="int64")
        after = self.binary("gt", sinks, self.binary("add", lowest, self.number(beside - 1)), "bool")
        apart = self.binary("or", self.binary("lt", sinks, lowest, "bool"), after, "bool")
        shape = (self.count, chunks.first)
        far = self.builder.emit("where", apart, sinks, self.number(-1), shape=shape, dtype="int64")
        return self.builder.emit("concat", far, near, shape=(self.count, chunks.keys), dtype="int64", axis=1)

    def write_keys(self) -> Value:
        """The key at (n, j), held inside, [N, M]."""
        return self.binary("maximum", self.binary("minimum", self.once("places"), self.once("last")), self.number(0))

    def write_inside(self) -> Value:
        """Whether there is a key at (n, j), bool [1, 1, N, 1, 1, M]."""
        found = self.binary("eq", self.once("places"), self.once("keys"), "bool")
        return self.builder.emit("reshape", found, shape=(1, 1, self.count, 1, 1, self.chunks.keys), dtype="bool")

    def gather(self, value: Value, axis: int, by: str) -> Value:
        """Read one axis of a value at `rows` or `keys`: two dimensions (n, c) or (n, j) stand in its place."""
        shape, positions = shape_of(value), self.once(by)
        wanted = (*shape[:axis], *shape_of(positions), *shape[axis + 1 :])
        return self.builder.emit("gather", value, positions, shape=wanted, dtype=value.dtype, axis=axis)
