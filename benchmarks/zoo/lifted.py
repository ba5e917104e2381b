"""How much of the masks and biases of a spec is an expression, and how much is still a tensor.

    causal & load(attention_mask, b, k) add(load(table, h, k - q))     three terms, all lifted
    add(load(bias0, b, 0, row, k))                                      one term, left as a tensor

A term is left where it reads an operand element by element: by the query along one dimension and by the key along another.
"""

from __future__ import annotations

from attnopt.ir.expr import Expr, Load, conjuncts, indices, walk
from attnopt.ir.spec import AttentionSpec

QUERY = {"q", "row"}


def terms(spec: AttentionSpec) -> list[Expr]:
    """The parts of the mask, and what is added or multiplied to scores, without plain numbers."""
    score = [c.expr(0) for c in spec.score if c.name in ("add", "scale")]
    return [*conjuncts(spec.mask), *(e for e in score if indices(e) or any(isinstance(x, Load) for x in walk(e)))]


def is_tensor(term: Expr) -> bool:
    return any(by_element(load) for load in walk(term) if isinstance(load, Load))


def by_element(load: Load) -> bool:
    reads = [indices(i) for i in load.indices]
    return any(r & QUERY and "k" not in r for r in reads) and any("k" in r and not r & QUERY for r in reads)


def counts(spec: AttentionSpec) -> tuple[int, int]:
    """(terms that are expressions, terms that are tensors)."""
    found = terms(spec)
    left = sum(is_tensor(t) for t in found)
    return len(found) - left, left
