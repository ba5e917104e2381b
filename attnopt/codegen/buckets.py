"""Logarithmic buckets of distances as comparisons with whole numbers, because processors round logarithms in their own ways.

    bucket(8, 2.77)   ->   first distances 12, 16, 23, 32, 46, 64, 91 of the buckets 9 … 15

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
