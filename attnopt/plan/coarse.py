"""Coarse plans: of each pass at most one kind, everywhere it is offered, which is what one would choose by hand.

    int8 | windows of 256 | int8 and windows of 256     for a budget: the one that saves most of those whose losses add up to no more

What a kind loses everywhere was measured on the whole model: the sum over two or three kinds is a better prediction than one over a hundred
options of which few were measured alone. So the best coarse plan is measured before those of the integer program, and a search that has
time for little is not behind what is chosen without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from attnopt.ir.site import Refusal
from attnopt.plan.knapsack import Option, Place, Problem, solve
from attnopt.plan.proposals import Move, moves_of

if TYPE_CHECKING:
    from attnopt.plan.search import Search

TRIED = 2  # coarse plans that are measured for a budget: the second where the first loses more than was predicted
OVERLAP = 0.5  # of the groups of a kind: beyond it two kinds are alternatives, not parts of one plan
Picks = tuple[int, ...]


def measure_coarse(search: Search, allowed: float) -> None:
    """Measure the best coarse plan of several kinds for a budget; what it lost is in `search.tried`."""
    scale = 1.0
    for _ in range(TRIED):
        kinds = best_kinds(search, allowed, scale)
        picks = together(search, kinds)
        if len(kinds) < 2 or picks in search.tried:
            return
        measured = search.limit(search.judged(picks).loss)
        predicted = sum(search.losses.additive(search.everywhere[k].mean) for k in kinds)
        if measured <= allowed or not predicted > 0:
            return
        scale = 1.02 * search.losses.additive(measured) / predicted


def best_kinds(search: Search, allowed: float, scale: float) -> list[str]:
    """The kinds, of each pass one at most, that save most together where each loses `scale` times what it loses everywhere."""
    by_pass: dict[tuple[str, ...], list[str]] = {}
    for kind in search.kinds:
        by_pass.setdefault(search.passes_of(kind), []).append(kind)
    groups, place = [], dict[str, Place]()
    for g, kinds in enumerate(by_pass.values()):
        place |= {kind: (g, i + 1) for i, kind in enumerate(kinds)}
        losses = [scale * search.losses.additive(search.everywhere[kind].mean) for kind in kinds]
        worths = [search.total_worth(search.whole(kind)) for kind in kinds]
        groups.append((Option(0.0, 0.0), *(Option(-w, x) for w, x in zip(worths, losses, strict=True))))
    apart = tuple((place[a], place[b]) for a, b in combinations(place, 2) if place[a][0] != place[b][0] and rivals(search, a, b))
    solution = solve(Problem(tuple(groups), excludes=apart), search.losses.additive(allowed))
    if isinstance(solution, Refusal):
        return []
    return [kind for kind, (g, i) in place.items() if solution.picks[g] == i]


def rivals(search: Search, one: str, other: str) -> bool:
    """Whether most of what one kind does cannot be done beside the other: they choose for the same groups, or change the same weights."""
    if one > other:
        one, other = other, one
    if (one, other) not in search.rivals:
        a, b = search.whole(one), search.whole(other)
        search.rivals[one, other] = any(x and y for x, y in zip(a, b, strict=True)) or crossed(
            moves_of(search.classes, a), moves_of(search.classes, b)
        )
    return search.rivals[one, other]


def crossed(one: Sequence[Move], other: Sequence[Move]) -> bool:
    """Whether both exclude more than OVERLAP of the other."""

    def share(some: Sequence[Move], others: Sequence[Move]) -> float:
        touched = frozenset[str]().union(*(m.candidate.touches | {n.name for n in m.candidate.removes} for m in others))
        sites = frozenset[str]().union(*(m.sites for m in others))
        hit = sum(bool(m.candidate.touches & touched or {n.name for n in m.candidate.removes} & sites) for m in some)
        return hit / max(1, len(some))

    return min(share(one, other), share(other, one)) > OVERLAP


def together(search: Search, kinds: list[str]) -> Picks:
    """Each kind everywhere, but where an earlier one excludes it; first what removes most."""
    taken: list[Move] = []
    picks = [0] * len(search.classes)
    for kind in sorted(kinds, key=lambda k: (-removed(search, k), k)):
        for g, i in enumerate(search.whole(kind)):
            moves = search.classes[g].options[i].moves
            if i and not picks[g] and not any(m.excludes(t) for m in moves for t in taken):
                picks[g] = i
                taken += moves
    return tuple(picks)


def removed(search: Search, kind: str) -> int:
    """Nodes that a kind removes everywhere."""
    return sum(len(m.candidate.removes) for m in moves_of(search.classes, search.whole(kind)))
