"""Write index expressions on the grid of chunks: the same tree as `Materializer`, at [B, G, N, R, C, M].

load(padding, b, k)   ->   Gather(padding [B, L], keys [N, M])        bool [B, 1, N, 1, 1, M]
k <= q                ->   a tile [C, M] for all chunks, because it follows q - k alone
"""

from __future__ import annotations

from dataclasses import dataclass, field

from attnopt.codegen.chunks import ChunkGrid
from attnopt.codegen.materialize import Materializer, broadcast, shape_of
from attnopt.ir.dims import Dim, Shape, product
from attnopt.ir.expr import Apply, Const, Expr, Index, Load, Size, Term, expand_term
from attnopt.ir.graph import Value
from attnopt.ir.site import Refusal, Site

PLACES = {"b": 0, "h": 1, "row": 2, "q": 2, "k": 3}  # where an index stands among [B, H, Q, K]


def on_chunks(expr: Expr | None, site: Site) -> Refusal | None:
    """None where `ChunkWriter` can write the expression at this site: loads at plain indices, lengths of queries and keys."""
    if expr is None or isinstance(expr, (Const, Index)):
        return None
    if isinstance(expr, Term):
        return on_chunks(expand_term(expr), site)
    if isinstance(expr, Size):
        return None if expr.name in ("q", "k") else Refusal(f"size({expr.name}) has no node in this graph", expr)
    if isinstance(expr, Load):
        return loadable(expr, site)
    return next((r for a in expr.args if (r := on_chunks(a, site))), None)


def loadable(load: Load, site: Site) -> Refusal | None:
    """None where the load reads whole dimensions of its operand, each by an index of its own."""
    operand = site.operands.get(load.operand)
    if operand is None:
        return Refusal(f"'{load.operand}' is not an operand of this site", load)
    shape, names = operand.value.shape, [i.name for i in load.indices if isinstance(i, Index)]
    if shape is None or len(shape) != len(load.indices):
        return Refusal(f"'{load.operand}' has another rank than it is read with", load)
    first_of_one = all(isinstance(i, Index) or (i == Const(0) and d == 1) for i, d in zip(load.indices, shape, strict=True))
    if not first_of_one or len({PLACES[n] for n in names}) < len(names):
        return Refusal(f"'{load.operand}' is read at computed places", load)
    sizes = {PLACES[i.name]: d for i, d in zip(load.indices, shape, strict=True) if isinstance(i, Index)}
    if {2, 3} <= sizes.keys() and not isinstance(sizes[3], int) and sizes[3] != site.size("k"):
        return Refusal(f"the rows of '{load.operand}' have another length than there are keys", load)
    return None


@dataclass
class ChunkWriter(Materializer):
    """Writes expressions on the grid. With `relative`, positions count from a chunk's first key: for what follows q - k alone."""

    grid: ChunkGrid = field(kw_only=True)
    relative: bool = False

    def _write(self, expr: Expr) -> Value:
        if isinstance(expr, Load):
            return self.load(expr)
        if isinstance(expr, Size):
            return self.grid.once("length")
        if isinstance(expr, Apply) and expr.op in ("and", "or", "not"):
            inputs = [self.truth(a) for a in expr.args]
            return self.builder.emit(expr.op, *inputs, shape=broadcast(*map(shape_of, inputs)), dtype="bool")
        return super()._write(expr)

    def truth(self, expr: Expr) -> Value:
        """The expression as bool: a mask may be stored as numbers."""
        value = self.write(expr)
        return value if value.dtype == "bool" else self.builder.emit("cast", value, shape=shape_of(value), dtype="bool")

    def index(self, name: str) -> Value:
        b, g, n, r, c, j = self.grid.sizes
        shape: Shape
        if name in ("b", "h"):
            made = self.grid.count_up(b if name == "b" else product([g, r]))
            shape = (b, 1, 1, 1, 1, 1) if name == "b" else (1, g, 1, r, 1, 1)
        elif name == "k":
            made = self.grid.count_up(j) if self.relative else self.grid.once("keys")
            shape = (1, 1, 1 if self.relative else n, 1, 1, j)
        else:
            made = self.grid.count_up(c, self.grid.chunks.behind) if self.relative else self.grid.once("rows")
            shape = (1, 1, 1 if self.relative else n, 1, c, 1)
        return self.builder.emit("reshape", made, shape=shape, dtype="int64")

    def load(self, expr: Load) -> Value:
        """The operand at the grid's places, [B|1, G|1, N|1, R|1, C|1, M|1]."""
        value = self.apart(expr)
        b, g, r, q, k = shape_of(value)
        if q != 1 and k != 1:
            value = self.at_both(value)
        elif k != 1:
            value = self.grid.gather(value, 4, "keys")
            *_, n, j = shape_of(value)
            value = self.builder.emit("reshape", value, shape=(b, g, r, n, 1, j), dtype=value.dtype)
        elif q != 1:
            value = self.grid.gather(value, 3, "rows")
        else:
            value = self.builder.emit("reshape", value, shape=(b, g, r, 1, 1, 1), dtype=value.dtype)
        b, g, r, n, c, j = shape_of(value)  # type: ignore[misc]
        if 1 in (r, n):  # a reshape costs nothing; onnxruntime would carry a transpose on to the whole mask
            return self.builder.emit("reshape", value, shape=(b, g, n, r, c, j), dtype=value.dtype)
        return self.builder.emit("permute", value, shape=(b, g, n, r, c, j), dtype=value.dtype, perm=(0, 1, 3, 2, 4, 5))

    def apart(self, expr: Load) -> Value:
        """The operand as [B|1, G|1, R|1, Q|1, K|1], its dimensions in the order of the indices."""
        value = self.site.operands[expr.operand].value
        held = sorted((PLACES[i.name], at) for at, i in enumerate(expr.indices) if isinstance(i, Index))
        ones = [at for at, i in enumerate(expr.indices) if not isinstance(i, Index)]
        perm = (*(at for _, at in held), *ones)
        if perm != tuple(range(len(perm))):
            value = self.builder.emit(
                "permute", value, shape=tuple(shape_of(value)[i] for i in perm), dtype=value.dtype, perm=perm
            )
        sizes: dict[int, Dim] = {place: shape_of(value)[i] for i, (place, _) in enumerate(held)}
        b, h, q, k = (sizes.get(place, 1) for place in range(4))
        by_head = (1, 1) if h == 1 else (self.site.size("g"), self.site.size("r"))
        return self.builder.emit("reshape", value, shape=(b, *by_head, q, k), dtype=value.dtype)

    def at_both(self, value: Value) -> Value:
        """[B|1, G|1, R|1, Q, K] at (row, key): the two are one dimension for the length of a gather."""
        b, g, r, q, k = shape_of(value)
        grid = self.grid
        rows = self.builder.emit("reshape", grid.once("rows"), shape=(grid.count, grid.chunks.rows, 1), dtype="int64")
        keys = self.builder.emit("reshape", grid.once("keys"), shape=(grid.count, 1, grid.chunks.keys), dtype="int64")
        row_length = grid.number(k) if isinstance(k, int) else grid.once("length")
        places = grid.binary("add", grid.binary("mul", rows, row_length), keys)
        flat = self.builder.emit("reshape", value, shape=(b, g, r, product([q, k])), dtype=value.dtype)
        return self.builder.emit("gather", flat, places, shape=(b, g, r, *shape_of(places)), dtype=value.dtype, axis=3)
