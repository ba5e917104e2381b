"""Logarithmic buckets of distances as comparisons with whole numbers, because GPUs round logarithms in their own way.

    bucket(8, 2.77)   ->   distance = tl.abs(k - q)
                           bucket = tl.minimum(distance, 8)
                           bucket += tl.cast(distance >= 12, tl.int32)  …

The thresholds are read off the meaning of the term, which counts up with the distance: the first distance in each bucket.
"""

from __future__ import annotations

import functools
import math

from attnopt.ir.evaluate import Grid, evaluate
from attnopt.ir.expr import Expr, Term

BUCKETS = ("bucket", "causal_bucket")
FURTHEST = 1 << 20  # distances that are tabulated to find the thresholds


def is_bucket(expr: Expr) -> bool:
    return isinstance(expr, Term) and expr.name in BUCKETS and int(expr.args[0]) * math.exp(expr.args[1]) < FURTHEST


@functools.cache
def thresholds(n: int, ratio: float) -> tuple[int, ...]:
    """The first distance in each of the buckets n + 1 … 2n - 1."""
    longest = int(n * math.exp(ratio)) + 2
    values = evaluate(Term("causal_bucket", (n, ratio)), Grid(1, 1, longest + 1, 1)).flatten().tolist()
    return tuple(next((d for d, value in enumerate(values) if value >= bucket), longest + 1) for bucket in range(n + 1, 2 * n))


def bucket_lines(term: Term, name: str) -> list[str]:
    """Statements after which `name` holds the bucket of q and k."""
    n, ratio = int(term.args[0]), float(term.args[1])
    both = term.name == "bucket"
    lines = [f"distance = {'tl.abs(k - q)' if both else 'tl.maximum(q - k, 0)'}", f"{name} = tl.minimum(distance, {n})"]
    lines += [f"{name} += tl.cast(distance >= {limit}, tl.int32)" for limit in thresholds(n, ratio)]
    return [*lines, f"{name} += tl.where(k > q, {2 * n}, 0)"] if both else lines
