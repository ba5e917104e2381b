"""The price of a fused attention kernel with tiles of one size: what a mask wastes at their edges, what is read again, what waits.

    estimate_tile(parse("softmax causal & window(64)"), shape, "float16", rows=128, keys=128, target=h200)
        ->  Estimate: blocks of 128 x 128 compute 3.2 times the pairs that are visible, blocks of 64 x 32 only 1.8 times

How well a size keeps tensor cores busy is not seen here: that is a judgement, or a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping

from attnopt.cost.estimate import Estimate, of_phases
from attnopt.cost.kernels import fused
from attnopt.cost.problem import Problem
from attnopt.cost.target import Target
from attnopt.ir.spec import AttentionSpec


def estimate_tile(
    spec: AttentionSpec, shape: Mapping[str, int], dtype: str, *, rows: int, keys: int, target: Target, family: str = "triton"
) -> Estimate:
    """One call on tiles of `rows` queries by `keys` keys. shape: b, h, g (query, key heads), q, k (lengths), d, e (key, value width)."""
    problem = Problem(spec.with_(plus=(), gate=None), dict(shape), dtype)
    return of_phases([fused(problem, target, family, (rows, keys), skips=True)], problem.product_type, target)
