"""Equations of einsum with every label written out, as both hosts read them.

"...hqk,...khd->...qhd" on ranks 4, 4     ->     [0 h q k], [0 k h d]  ->  [0 q h d]
"""

from __future__ import annotations


def written_out(equation: str, ranks: list[int]) -> tuple[list[list[str]], list[str]] | None:
    """Labels of each operand and of the result, "..." as numbers; None where a label repeats or operands broadcast."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return None
    free = {rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True) if "..." in term}
    if len(free) > 1 or any(n < 0 for n in free):
        return None
    dots = [str(i) for i in range(*free)] if free else []

    def labels(term: str) -> list[str]:
        before, found, after = term.partition("...")
        return [*before, *(dots if found else []), *after]

    sides = [labels(term) for term in terms]
    every = [c for side in sides for c in side]
    out = labels(right) if arrow else [*dots, *sorted(c for c in set(every) - set(dots) if every.count(c) == 1)]
    sound = all(len(set(side)) == len(side) for side in (*sides, out)) and set(out) <= set(every)
    return (sides, out) if sound and all(len(s) == r for s, r in zip(sides, ranks, strict=True)) else None
