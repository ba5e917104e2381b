"""One option for each group: the least cost with a total loss inside the budget, a multiple-choice knapsack solved as an integer program.

    minimise  sum_i cost_i x_i    s.t.  sum_i loss_i x_i <= budget,  sum_(i in group) x_i = 1,  x_i = x_j for ties,  x_i + x_j <= 1
                                                                                                             for options that exclude

Options that another of their group beats in both cost and loss are left out first, unless a tie or an exclusion names them. scipy's
milp (HiGHS) solves the rest: the same problem has the same answer. Where time runs out, the best found is returned with its gap.
Source: Kellerer, Pferschy and Pisinger, "Knapsack Problems", chapter 11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from attnopt.ir.site import Refusal

GAP = 1e-4  # of the cost that all options could save: nearer to the optimum than that is not searched
SLACK = 1e-6  # the solver holds constraints to about this share: the budget is tightened by as much where it did not
Place = tuple[int, int]  # group, option


@dataclass(frozen=True)
class Option:
    """What one option of a group costs (seconds or bytes; less than 0 is a gain) and loses."""

    cost: float
    loss: float


@dataclass(frozen=True)
class Problem:
    """Groups of options. ties: places that are taken all or none. excludes: pairs of places that are not taken together."""

    groups: tuple[tuple[Option, ...], ...]
    ties: tuple[tuple[Place, ...], ...] = ()
    excludes: tuple[tuple[Place, Place], ...] = ()


@dataclass(frozen=True)
class Solution:
    """The option of each group; totals; bound: no choice costs less; gap: cost over bound, as a share of what could be saved."""

    picks: tuple[int, ...]
    cost: float
    loss: float
    bound: float
    gap: float
    finished: bool = True


def solve(problem: Problem, budget: float, *, seconds: float = 10.0) -> Solution | Refusal:
    """The cheapest choice within the budget, to GAP of what could be saved; a Refusal where there is none."""
    if not problem.groups:
        return Solution((), 0.0, 0.0, 0.0, 0.0)
    kept = undominated(problem, budget)
    if empty := [g for g, places in enumerate(kept) if not places]:
        return Refusal(f"no option of group {empty[0]} is within the budget {budget:g}")
    solution = integer_program(problem, kept, budget, seconds)
    if isinstance(solution, Solution) and solution.loss > budget:
        solution = integer_program(problem, kept, budget * (1 - SLACK) ** 2, seconds)
    return solution


def undominated(problem: Problem, budget: float) -> list[list[int]]:
    """The options of each group that are worth asking for; of equal ones the first."""
    bound = {place for tied in problem.ties for place in tied} | {place for pair in problem.excludes for place in pair}
    result = []
    for g, options in enumerate(problem.groups):
        free = [i for i, o in enumerate(options) if (g, i) not in bound and o.loss <= budget and math.isfinite(o.cost)]
        kept, best = [], math.inf
        for i in sorted(free, key=lambda i: (options[i].loss, options[i].cost, i)):
            if options[i].cost < best:
                best = options[i].cost
                kept.append(i)
        tied = [i for i, o in enumerate(options) if (g, i) in bound and o.loss <= budget and math.isfinite(o.cost)]
        result.append(sorted([*kept, *tied]))
    return result


@dataclass
class Rows:
    """Constraints of the program as they are written: coefficients by column, least and most."""

    coefficients: list[dict[int, float]] = field(default_factory=list)
    least: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)

    def add(self, row: dict[int, float], least: float, most: float) -> None:
        self.coefficients.append(row)
        self.least.append(least)
        self.most.append(most)


def constraints(problem: Problem, column: dict[Place, int], budget: float) -> Rows:
    """One option for each group, the budget, ties and exclusions. The budget's row is in shares of it, so that it has scale 1."""
    rows = Rows()
    for g in range(len(problem.groups)):
        rows.add({n: 1.0 for (group, _), n in column.items() if group == g}, 1.0, 1.0)
    if budget > 0:
        rows.add({n: problem.groups[g][i].loss / budget for (g, i), n in column.items()}, -np.inf, 1.0)
    for tied in problem.ties:
        present = [column[p] for p in tied if p in column]
        if len(present) < len(tied):  # one of them is over the budget: none can be taken
            for n in present:
                rows.add({n: 1.0}, 0.0, 0.0)
        for one, other in pairwise(present):
            rows.add({one: 1.0, other: -1.0}, 0.0, 0.0)
    for a, b in problem.excludes:
        if a in column and b in column:
            rows.add({column[a]: 1.0, column[b]: 1.0}, 0.0, 1.0)
    return rows


def integer_program(problem: Problem, kept: Sequence[Sequence[int]], budget: float, seconds: float) -> Solution | Refusal:
    """The program over the options that are kept. Costs count from the dearest of each group, in shares of what could be saved."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    places = [(g, i) for g, options in enumerate(kept) for i in options]
    rows = constraints(problem, {place: n for n, place in enumerate(places)}, budget)
    dearest = [max(problem.groups[g][i].cost for i in row) for g, row in enumerate(kept)]
    saved = np.array([problem.groups[g][i].cost - dearest[g] for g, i in places])
    unit = sum(d - min(problem.groups[g][i].cost for i in kept[g]) for g, d in enumerate(dearest)) or 1.0
    at = [(r, n, v) for r, row in enumerate(rows.coefficients) for n, v in row.items()]
    shape = (len(rows.coefficients), len(places))
    matrix = csr_array(([v for *_, v in at], ([r for r, *_ in at], [n for _, n, _ in at])), shape=shape)
    found = milp(
        saved / unit,
        constraints=LinearConstraint(matrix, rows.least, rows.most),
        integrality=np.ones(len(places)),
        bounds=Bounds(0, 1),
        options={"time_limit": seconds, "mip_rel_gap": GAP},
    )
    if found.x is None:
        why = f"was found in {seconds:g} s" if found.status == 1 else f"of options is within the budget {budget:g}"
        return Refusal(f"no choice {why}")
    picks = [0] * len(kept)
    for n in np.flatnonzero(found.x > 0.5):
        picks[places[n][0]] = places[n][1]
    taken = [problem.groups[g][i] for g, i in enumerate(picks)]
    cost, loss = math.fsum(o.cost for o in taken), math.fsum(o.loss for o in taken)
    proven = found.mip_dual_bound if found.mip_dual_bound is not None else found.fun
    bound = min(cost, math.fsum(dearest) + unit * float(proven))
    return Solution(tuple(picks), cost, loss, bound, (cost - bound) / unit, found.status == 0)
