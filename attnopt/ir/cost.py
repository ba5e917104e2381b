"""What an attention costs, as closed forms of its shape: floating-point operations, bytes moved, working set.

    cost("softmax heads(12) width(64) causal", {b: 1, h: 12, g: 12, q: 512, k: 512, d: 64, e: 64})
        flops  = 2 b h pairs (d + e) + b h pairs (terms of the score)     pairs = visible (query, key) pairs of a head
        bytes  = q, k, v read once and the output written once            a fused kernel never writes the scores
        working_set = the score matrix of one head, in float32            what a kernel that is not fused must hold

A linear or recurrent normaliser never forms pairs: its state of d x e numbers is read and updated once per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Apply, Const, Expr, Load, Term, expand_term, operands
from attnopt.ir.signatures import BITS
from attnopt.ir.spec import AttentionSpec, as_spec

WIDTHS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, **BITS}
ROWS = 512  # masks are counted on at most so many queries, evenly spread
PER_SCORE = {"softmax": 5, "sigmoid": 4, "signed_softmax": 7, "zscore": 8, "orthogonal": 4, "polynomial": 4, "weights": 1}
PER_TERM = {"scale": 1, "add": 1, "softcap": 3, "mod": 2, "add_square": 3}
WITHOUT_PAIRS = ("linear", "recurrent")


@dataclass(frozen=True)
class Cost:
    """flops: operations, a multiply-add counted as two. bytes: read and written. working_set: bytes held at once."""

    flops: float
    bytes: float
    working_set: float


def cost(spec: AttentionSpec | str, shape: Mapping[str, int], dtype: str = "float32") -> Cost:
    """The price of one call. `shape` gives b, h, g (query and key heads), q, k (lengths), d, e (key and value width)."""
    spec = as_spec(spec)
    b, h, g, q, k, d, e = (shape[name] for name in ("b", "h", "g", "q", "k", "d", "e"))
    width = WIDTHS.get(dtype, 32) / 8
    moved = width * b * (h * q * (d + e) + g * k * (d + e)) if spec.cache is None else cached_bytes(spec, shape, width)
    if spec.normalizer.name in WITHOUT_PAIRS and spec.selection is None:
        return Cost(b * h * (q + k) * (2.0 * d * e + d), moved, 4.0 * d * e)
    pairs = visible_pairs(spec, q, k)
    return Cost(b * h * pairs * (2.0 * (d + e) + per_score(spec)), moved, 4.0 * q * k)


def cached_bytes(spec: AttentionSpec, shape: Mapping[str, int], width: float) -> float:
    """Keys and values in the types of the cache, queries and the output in that of the call."""
    assert spec.cache is not None
    sides = {side: str(spec.cache.get(side)) for side in "kv"}
    per = {side: width if sides[side] == "fp32" else BITS[sides[side]] / 8 for side in "kv"}
    b, h, g, q, k, d, e = (shape[name] for name in ("b", "h", "g", "q", "k", "d", "e"))
    return b * (h * q * (d + e) * width + g * k * (d * per["k"] + e * per["v"]))


def per_score(spec: AttentionSpec) -> float:
    """Operations on each score besides the products: its terms and the normaliser."""
    normaliser = PER_SCORE.get(spec.normalizer.name, 5)
    if spec.normalizer.name in ("sinkhorn", "polynomial"):
        normaliser = 4 * spec.normalizer.count(0)
    return normaliser + sum(PER_TERM.get(clause.name, 2) for clause in spec.score)


def visible_pairs(spec: AttentionSpec, q: int, k: int) -> float:
    """How many (query, key) pairs of a head are computed: those that the mask shows, less what a selection leaves out."""
    seen = visible_fraction(spec.mask, q, k, offset_of(spec, q, k)) * q * k
    kept = selected_keys(spec, k)
    return seen if kept is None else min(seen, float(q) * kept)


def selected_keys(spec: AttentionSpec, k: int) -> int | None:
    """Keys per query that a selection keeps, None where there is none or data alone decides how many."""
    clause = spec.selection
    if clause is None or clause.name in ("blocks", "pooled_blocks", "sparsek"):
        return None
    if clause.name in ("top_keys", "keep"):
        extra = clause.count("recent") if "recent" in clause.signature.options else 0
        return min(k, clause.count(0) + extra)
    return min(k, clause.count(0) * clause.count(1))  # so many blocks or pages of so many keys


def offset_of(spec: AttentionSpec, q: int, k: int) -> int:
    return 0 if spec.offset is None else int(evaluate(spec.offset.expr(0), Grid(1, 1, q, k)))


def visible_fraction(mask: Expr | None, q: int, k: int, offset: int = 0) -> float:
    """Share of the pairs that a mask shows; what depends on data counts as visible.

    Exact up to 512 queries; beyond, the mean over 512 queries evenly spread.
    """
    if mask is None or not q or not k:
        return 1.0
    step = max(1, q // ROWS)
    shown = optimistic(mask)
    grid = Grid(1, 1, q, k, offset, q_step=step)
    seen = evaluate(shown, grid).bool()
    rows = len(range(0, q, step))
    return float(seen.expand(1, 1, rows, k).double().mean())


def optimistic(expr: Expr, hidden: bool = False) -> Expr:
    """The mask with every condition on data replaced by what shows most: true, or false under a negation."""
    if isinstance(expr, Term) and not operands(expr):
        return expr
    if isinstance(expr, Term):
        return optimistic(expand_term(expr), hidden)
    if isinstance(expr, Apply) and expr.op in ("and", "or"):
        return Apply(expr.op, tuple(optimistic(a, hidden) for a in expr.args))
    if isinstance(expr, Apply) and expr.op == "not":
        return Apply("not", (optimistic(expr.args[0], not hidden),))
    if isinstance(expr, Load) or operands(expr):
        return Const(not hidden)
    return expr


__all__ = ["Cost", "cost", "visible_fraction"]
