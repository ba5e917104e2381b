"""Turn tensors that hold masks and biases into index expressions, by reading the nodes that build them.

    where(le(iota_k, iota_q), 0, min)     ->     where(k <= q, 0.0, -3.4e38)

Every node becomes an expression of the same element: layout operations change the indices, element-wise ones the expression.
Nothing is sampled; what no rule describes stays a load.
"""

from __future__ import annotations

from attnopt.patterns.lifting.lifter import Lifter, Lifters

__all__ = ["Lifter", "Lifters"]
