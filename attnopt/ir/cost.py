"""What an attention costs, as closed forms of its shape: floating-point operations, bytes moved, working set.

    cost("softmax heads(12) width(64) causal", {b: 1, h: 12, g: 12, q: 512, k: 512, d: 64, e: 64})
        flops  = 2 b h pairs (d + e) + b h pairs (terms of the score)     pairs = visible (query, key) pairs of a head
        bytes  = q, k, v read once and the output written once            a fused kernel never writes the scores
        working_set = the score matrix of one head, in float32            what a kernel that is not fused must hold

A linear or recurrent normaliser never forms pairs: its state of d x e numbers is read and updated once per token.
What only data decides (a padding mask, an offset, how many blocks pass) is priced at the most that it can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from attnopt.ir.clause import Clause
from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import (
    Apply,
    Const,
    Expr,
    Index,
    Size,
    Term,
    apply,
    expand_term,
    indices,
    operands,
    substitute,
    walk,
)
from attnopt.ir.signatures import BITS
from attnopt.ir.spec import AttentionSpec, as_spec

WIDTHS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, **BITS}
ROWS = 512  # masks are counted on at most so many queries, evenly spread
PAIRS = 1 << 22  # and so many pairs at a time, so that a long context does not fill the memory
PER_SCORE = {"softmax": 5, "sigmoid": 4, "signed_softmax": 7, "zscore": 8, "orthogonal": 4, "weights": 1}
PER_TERM = {"scale": 1, "add": 1, "softcap": 3, "mod": 2, "add_square": 3}
WITHOUT_PAIRS = ("linear", "recurrent")


@dataclass(frozen=True)
class Cost:
    """flops: operations, a multiply-add counted as two. bytes: read and written. working_set: bytes held at once."""

    flops: float
    bytes: float
    working_set: float


def cost(spec: AttentionSpec | str, shape: Mapping[str, int], dtype: str = "float32") -> Cost:
    """The price of one call. `shape` gives b, h, g (query, key heads), q, k (lengths), d, e (key, value width)."""
    spec = as_spec(spec)
    own = cost_alone(spec, shape, dtype)
    added = [cost(clause.spec(1), shape, dtype) for clause in spec.plus]
    return Cost(
        own.flops + sum(c.flops for c in added),
        own.bytes + sum(c.bytes for c in added),
        max([own.working_set, *(c.working_set for c in added)]),  # one after the other
    )


def cost_alone(spec: AttentionSpec, shape: Mapping[str, int], dtype: str) -> Cost:
    """The price without the attentions that `plus` adds."""
    b, h, q, k, d, e = (shape[name] for name in ("b", "h", "q", "k", "d", "e"))
    moved = bytes_moved(spec, shape, WIDTHS.get(dtype, 32) / 8)
    if spec.normalizer.name in WITHOUT_PAIRS and spec.selection is None:
        return Cost(b * h * (q + k) * (2.0 * d * e + d), moved, 4.0 * d * e)
    pairs = visible_pairs(spec, q, k)
    mixes = 2.0 * h * sum(clause.name in ("mix", "weight_mix") for clause in (*spec.score, *spec.weighting))
    return Cost(b * h * pairs * (2.0 * (d + e) + mixes + per_score(spec)), moved, 4.0 * q * k * (h if mixes else 1))


def bytes_moved(spec: AttentionSpec, shape: Mapping[str, int], width: float) -> float:
    """q, k, v and the output once; keys and values as the cache holds them, else as `precision` rounds them."""
    b, h, g, q, k, d, e = (shape[name] for name in ("b", "h", "g", "q", "k", "d", "e"))
    cached = spec.cache or spec.precision
    per_q, per_k, per_v = stored(spec.precision, "q", width), stored(cached, "k", width), stored(cached, "v", width)
    return b * (h * q * (d * per_q + e * width) + g * k * (d * per_k + e * per_v))


def stored(clause: Clause | None, side: str, width: float) -> float:
    """Bytes per number of one side; fp32 is how a clause says that it leaves the side as it is."""
    kind = "fp32" if clause is None else clause.word(side)
    return width if kind == "fp32" else BITS[kind] / 8


def per_score(spec: AttentionSpec) -> float:
    """Operations on each score besides the products: its terms and the normaliser."""
    normaliser = PER_SCORE.get(spec.normalizer.name, 5)
    if spec.normalizer.name in ("sinkhorn", "polynomial"):
        normaliser = 4 * spec.normalizer.count(0)
    return normaliser + sum(PER_TERM.get(clause.name, 2) for clause in spec.score)


def visible_pairs(spec: AttentionSpec, q: int, k: int) -> float:
    """How many (query, key) pairs of a head are computed: those that the mask shows, less what is not selected."""
    kept = selected_keys(spec, k)
    return selected_share(spec) * q * keys_per_query(spec.mask, q, k, offset_of(spec, q, k), k if kept is None else kept)


def selected_keys(spec: AttentionSpec, k: int) -> int | None:
    """Keys per query that a selection keeps, None where there is none or data alone decides how many."""
    clause = spec.selection
    if clause is None or clause.name in ("blocks", "pooled_blocks", "sparsek"):
        return None
    if clause.name in ("top_keys", "keep"):
        extra = clause.count("recent") if "recent" in clause.signature.options else 0
        return min(k, clause.count(0) + extra)
    return min(k, clause.count(0) * clause.count(1))  # so many blocks or pages of so many keys


def selected_share(spec: AttentionSpec) -> float:
    """Share of the visible tiles that a selection keeps, 1 where there is none or data alone decides."""
    clause = spec.selection
    shared = clause is not None and clause.name == "pooled_blocks" and clause.number("share") > 0
    return min(1.0, clause.number("share")) if clause is not None and shared else 1.0


def offset_of(spec: AttentionSpec, q: int, k: int) -> int:
    """Position of the first query. Where only data tells, the queries are the last of the keys, as in decoding."""
    if spec.offset is None:
        return 0
    expr = spec.offset.expr(0)
    return int(evaluate(expr, Grid(1, 1, q, k))) if is_known(expr) else max(0, k - q)


def visible_fraction(mask: Expr | None, q: int, k: int, offset: int = 0) -> float:
    """Share of the pairs that a mask shows; what depends on data, batch or head counts as visible.

    Exact up to 512 queries; beyond, the mean over at most 512 queries evenly spread.
    """
    return keys_per_query(mask, q, k, offset, k) / k if q and k else 1.0


@lru_cache(maxsize=256)  # the layers of a model ask the same again and again
def keys_per_query(mask: Expr | None, q: int, k: int, offset: int, most: int) -> float:
    """The mean number of keys that a query sees, of which it takes at most `most`."""
    if mask is None or not q or not k:
        return float(min(k, most))
    shown = optimistic(mask)
    step = -(-q // ROWS)
    stride = step * max(1, PAIRS // k)
    counts = []
    for first in range(0, q, stride):
        shift = first + (step - 1) // 2  # the middle query stands for its neighbours
        here = substitute(shown, {"row": apply("add", Index("row"), shift)})
        grid = Grid(1, 1, min(stride, q - first), k, offset + shift, sizes={"q": q}, q_step=step)
        seen = evaluate(here, grid).bool().expand(1, 1, len(range(0, grid.q_len, step)), k)
        counts.append(seen.sum(-1).clamp(max=most).flatten())
    return float(torch.cat(counts).double().mean())


def is_known(expr: Expr) -> bool:
    """Whether the shape alone gives its value: no load, and no length but those of queries and keys."""
    return not operands(expr) and all(e.name in ("q", "k") for e in walk(expr) if isinstance(e, Size))


def optimistic(expr: Expr, hidden: bool = False) -> Expr:
    """The mask with every condition on data, batch or head replaced by what shows most.

    causal & ~load(m, b, k)  ->  causal & ~false
    """
    if is_known(expr) and not indices(expr) & {"b", "h"}:
        return expr
    if isinstance(expr, Term):
        return optimistic(expand_term(expr), hidden)
    if isinstance(expr, Apply) and expr.op in ("and", "or"):
        return Apply(expr.op, tuple(optimistic(a, hidden) for a in expr.args))
    if isinstance(expr, Apply) and expr.op == "not":
        return Apply("not", (optimistic(expr.args[0], not hidden),))
    return Const(not hidden)


__all__ = ["Cost", "cost", "visible_fraction"]
