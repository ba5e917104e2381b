"""How much of the masks and biases of a spec is an expression, and how much is still a tensor.

    causal & load(attention_mask, b, k) add(load(table, h, k - q))     three terms, all lifted
    add(load(bias0, b, 0, row, k))                                      one term, left as a tensor

A term is left where it reads an operand element by element: by the query along one dimension and by the key along another, or by both
along one that is as long as there are scores. Where that operand is a product of activations (position scores of DeBERTa or XLNet) no
expression could stand for it: the term counts as neither.
"""

from __future__ import annotations

from collections.abc import Mapping

from attnopt.ir.dims import Dim, Shape, product
from attnopt.ir.expr import Expr, Load, conjuncts, indices, walk
from attnopt.ir.spec import AttentionSpec

QUERY = {"q", "row"}


def terms(spec: AttentionSpec) -> list[Expr]:
    """The parts of the mask, and what is added or multiplied to scores, without plain numbers."""
    score = [c.expr(0) for c in spec.score if c.name in ("add", "scale")]
    return [*conjuncts(spec.mask), *(e for e in score if indices(e) or any(isinstance(x, Load) for x in walk(e)))]


def loads(term: Expr) -> list[Load]:
    return [e for e in walk(term) if isinstance(e, Load)]


def by_element(load: Load, shapes: Mapping[str, Shape], scores: Dim) -> bool:
    """Whether the operand holds an element for each score, as far as its shape is known."""
    reads = [indices(i) for i in load.indices]
    if any(r & QUERY and "k" not in r for r in reads) and any("k" in r and not r & QUERY for r in reads):
        return True
    shape = shapes.get(load.operand, ())
    if len(shape) != len(reads) or not any(r & QUERY and "k" in r for r in reads):
        return False
    held = product(size for size, r in zip(shape, reads, strict=True) if r & {"k", *QUERY})
    return held == scores or (isinstance(held, int) and isinstance(scores, int) and held >= scores)


def counts(
    spec: AttentionSpec, shapes: Mapping[str, Shape] | None = None, scores: Dim = 0, products: frozenset[str] = frozenset()
) -> tuple[int, int]:
    """(terms that are expressions, terms that are tensors).

    shapes: of the operands. scores: queries times keys. products: names of the operands that are scores of their own.
    """
    read = [loads(term) for term in terms(spec)]
    judged = [r for r in read if not any(load.operand in products for load in r)]
    tensors = sum(any(by_element(load, shapes or {}, scores) for load in r) for r in judged)
    return len(judged) - tensors, tensors
