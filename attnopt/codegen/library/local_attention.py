"""softmax heads(8, 2) scale(s) causal & window(512) & padding   ->   Gather, MatMul, Add, Softmax, MatMul on chunks

Where the mask proves a band, each chunk of queries needs only the keys beside it: time and memory grow with the length, not
with its square, in standard operators that every ONNX runtime has. With C rows a chunk and M = C + band - 1 keys beside it:

    q [B, G, N, R·C, D] · k [B, G, N, M, D]'  ->  [B, G, N, R, C, M], + mask, softmax, · v [B, G, N, M, E]

Under `window(w) | global(s)` the first s keys of the sequence stand beside every chunk as well.

Grouped key heads are not repeated: the R query heads of a group are rows of one product. The rest of the mask (padding,
documents, …) and the biases are written on the same grid.

Source: "Longformer: The Long-Document Transformer" (sliding chunks), with one gather instead of overlapping views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnopt.codegen.additive_mask import plain_softmax
from attnopt.codegen.chunk_writer import on_chunks
from attnopt.codegen.local_writer import LocalWriter, worth_chunks
from attnopt.codegen.lowering import first_refusal
from attnopt.codegen.materialize import shape_of
from attnopt.ir.clause import Clause
from attnopt.ir.dims import product
from attnopt.ir.graph import Value
from attnopt.ir.site import Builder, Refusal, Site, arrange

SCORE_TERMS = ("scale", "softcap", "add")


@dataclass(frozen=True)
class LocalAttention:
    name: str = "local-attention"
    host: str = "onnx"
    opset: int = 13

    def supports(self, site: Site, runtime: str) -> Refusal | None:
        spec = site.spec
        exprs = [spec.mask, *(c.expr(0) for c in spec.score if c.name in ("scale", "add"))]
        unknown = [str(c) for c in spec.score if c.name not in SCORE_TERMS]
        return (
            worth_chunks(site)
            or first_refusal(
                (isinstance(site.size("g"), int) and isinstance(site.size("r"), int), "the number of heads is not known"),
                (site.q.value.dtype in ("float32", "float16", "float64"), f"dtype {site.q.value.dtype}"),
                (spec.scale is not None, "a tensor stands first among the scales"),
                (not unknown, f"score term '{next(iter(unknown), '')}'"),
                at=site.name,
            )
            or plain_softmax(site)
            or next((r for e in exprs if (r := on_chunks(e, site)) is not None), None)
        )

    def emit(self, site: Site, builder: Builder) -> Value:
        write, a = LocalWriter(site, builder), site.axes
        b, g, n, r, c, j = write.grid.sizes
        d, e, rows = site.size("d"), site.size("e"), product([r, c])
        q = arrange(builder, site.q, [a["b"], a["g"], a["r"], a["q"], a["d"]], broadcast=True)
        k = arrange(builder, site.k, [a["b"], a["g"], a["k"], a["d"]], broadcast=True)
        v = arrange(builder, site.v, [a["b"], a["g"], a["k"], a["e"]], broadcast=True)
        if site.spec.scale is not None and site.spec.scale != 1.0:
            q = write.binary("mul", q, write.number(site.spec.scale))
        queries = write.moved(write.grid.gather(q, 3, "rows"), 0, 1, 3, 2, 4, 5)
        queries = write.emit("reshape", queries, shape=(b, g, n, rows, d))
        keys = write.moved(write.grid.gather(k, 2, "keys"), 0, 1, 2, 4, 3)
        values = write.grid.gather(v, 2, "keys")
        scores = write.emit("matmul", queries, keys, shape=(b, g, n, rows, j))
        scores = write.emit("reshape", scores, shape=(b, g, n, r, c, j))
        for clause in after_scales(site.spec.score):
            scores = score(write, scores, clause)
        mask = write.mask()
        weights = write.emit("softmax", write.binary("add", scores, mask), shape=(b, g, n, r, c, j), axis=5)
        weights = write.emit("reshape", weights, shape=(b, g, n, rows, j))
        output = write.emit("matmul", weights, values, shape=(b, g, n, rows, e))
        return write.finish(write.emit("reshape", output, shape=(b, g, n, r, c, e)), mask, v)


def after_scales(terms: Sequence[Clause]) -> tuple[Clause, ...]:
    """The terms after the constant scales that stand first, which `spec.scale` holds."""
    first = next((i for i, c in enumerate(terms) if c.name != "scale"), len(terms))
    return tuple(terms[first:])


def score(write: LocalWriter, scores: Value, clause: Clause) -> Value:
    """One clause of the score, applied to [B, G, N, R, C, M]."""
    if clause.name == "softcap":
        cap = write.number(clause.number(0))
        squashed = write.emit("tanh", write.binary("div", scores, cap), shape=shape_of(scores))
        return write.binary("mul", squashed, cap)
    return write.binary("mul" if clause.name == "scale" else "add", scores, write.score_term(clause.expr(0)))
