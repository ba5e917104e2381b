"""What it takes to make a mask or a bias as a tensor, node by node, where a kernel wants one.

causal & padding      ->   q <= k on [Q, K] (9 bytes a pair: int64 in, bool out), and on [B, 1, Q, K], where on the same
"""

from __future__ import annotations

from dataclasses import replace

from attnopt.cost.phase import Phase
from attnopt.cost.problem import Problem
from attnopt.ir.expr import Apply, Const, Expr, Index, Load, Size, Term, expand_term

INDEX, TRUTH = 8.0, 1.0  # bytes of an int64 and of a bool
TRUTHS = ("and", "or", "not", "lt", "le", "gt", "ge", "eq", "ne")
AXES = {"b": "b", "h": "h", "q": "q", "row": "q", "k": "k"}


def additive(problem: Problem, family: str) -> list[Phase]:
    """The passes that make the one additive mask of a site from its biases and its mask; none where there is nothing to make."""
    spec = problem.spec
    if problem.held_mask:
        return []
    biases = [b for b in spec.biases if not isinstance(b, Const)]
    made: list[Phase] = []
    extents = [write(expr, problem, made)[0] for expr in [*biases, *([spec.mask] if spec.mask is not None else [])]]
    whole = frozenset().union(*extents)
    made += [node(whole, 3 * problem.width, problem) for _ in range(max(0, len(biases) - 1))]
    if spec.mask is not None:
        made.append(node(whole, TRUTH + problem.width, problem))  # where(mask, bias, lowest)
    return [replace(phase, family=family) for phase in made if phase.bytes]


def mask_bytes(problem: Problem) -> float:
    """Bytes of the additive mask as it is kept, broadcast over what it does not depend on."""
    spec = problem.spec
    parts = [*(b for b in spec.biases if not isinstance(b, Const)), *([spec.mask] if spec.mask is not None else [])]
    if not parts:
        return 0.0
    return size(frozenset().union(*(write(p, problem, [])[0] for p in parts)), problem) * problem.width


def write(expr: Expr, problem: Problem, made: list[Phase]) -> tuple[frozenset[str], float]:
    """(axes, bytes of an element) of the tensor that an expression is; the nodes on the way are added to `made`."""
    if isinstance(expr, Term):
        return write(expand_term(expr), problem, made)
    if isinstance(expr, Index):
        return frozenset({AXES[expr.name]}), INDEX
    if isinstance(expr, (Const, Size)):
        return frozenset(), INDEX
    if isinstance(expr, Load):
        axes = frozenset().union(*(write(i, problem, [])[0] for i in expr.indices))
        return axes, TRUTH if expr.operand == "padding" else problem.width
    assert isinstance(expr, Apply)
    inputs = [write(a, problem, made) for a in expr.args]
    axes = frozenset().union(*(a for a, _ in inputs))
    out = TRUTH if expr.op in TRUTHS else max((w for _, w in inputs), default=INDEX)
    full = sum(w for a, w in inputs if a == axes)  # a broadcast side stays in the nearest cache
    made.append(node(axes, full + out, problem))
    return axes, out


def size(axes: frozenset[str], problem: Problem) -> float:
    count = 1.0
    for axis in axes:
        count *= problem[axis]
    return count


def node(axes: frozenset[str], each: float, problem: Problem) -> Phase:
    count = size(axes, problem)
    return Phase("mask", "", operations=count, bytes=count * each, working_set=count * each)
