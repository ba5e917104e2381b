"""The knapsack: optimal on small problems by brute force, near its proven bound on large ones, deterministic, honest about time."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from attnopt.ir.site import Refusal
from attnopt.plan.search.knapsack import Option, Problem, Solution, solve, undominated


def random_groups(seed, groups, options):
    """The first option of each changes nothing; the others cost less the more they lose, with noise."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(groups):
        loss = random.lognormal(-6, 1, options - 1)
        gain = loss ** random.uniform(0.3, 0.8) * random.lognormal(0, 0.3, options - 1)
        made.append((Option(0.0, 0.0), *(Option(-float(g) * 1e-3, float(x)) for g, x in zip(gain, loss, strict=True))))
    return tuple(made)


def allowed(problem, picks):
    places = set(enumerate(picks))
    return all(len(places & set(t)) in (0, len(t)) for t in problem.ties) and not any(
        {a, b} <= places for a, b in problem.excludes
    )


def best_by_trying(problem, budget):
    best = np.inf
    for picks in itertools.product(*(range(len(g)) for g in problem.groups)):
        chosen = [problem.groups[g][i] for g, i in enumerate(picks)]
        if sum(o.loss for o in chosen) <= budget and allowed(problem, picks):
            best = min(best, sum(o.cost for o in chosen))
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 2.0])
def test_optimal_on_small_problems(seed, share):
    groups = random_groups(seed, 5, 4)
    ties = (((0, 1), (2, 2)),) if seed % 2 else ()
    excludes = (((1, 3), (3, 3)), ((1, 2), (4, 1))) if seed % 3 else ()
    problem = Problem(groups, ties, excludes)
    budget = share * sum(max(o.loss for o in g) for g in groups)
    found = solve(problem, budget)
    assert isinstance(found, Solution)
    assert found.loss <= budget
    assert allowed(problem, found.picks)
    worst = sum(min(o.cost for o in g) for g in groups)
    assert found.cost - best_by_trying(problem, budget) <= 1e-4 * -worst + 1e-12
    assert found == solve(problem, budget)


@pytest.mark.parametrize("seed", range(3))
def test_large_problems_are_near_their_bound_and_quick(seed):
    """32 groups of 30 options, with ties and exclusions."""
    groups = random_groups(seed, 32, 30)
    ties = tuple(((g, 29), (g + 1, 29)) for g in range(0, 20, 4))
    excludes = tuple(((g, i), (g + 2, i)) for g in range(0, 12, 3) for i in (5, 9))
    problem = Problem(groups, ties, excludes)
    budget = 0.05 * sum(max(o.loss for o in g) for g in groups)
    started = time.perf_counter()
    found = solve(problem, budget)
    assert time.perf_counter() - started < 10.0
    assert isinstance(found, Solution)
    assert found.loss <= budget
    assert allowed(problem, found.picks)
    assert found.bound <= found.cost <= found.bound * 0.99  # costs are gains: at least 99 % of what is possible
    assert found.gap <= 0.01


def test_beaten_options_are_left_out_but_not_those_of_ties():
    options = (Option(0.0, 0.0), Option(-1.0, 0.1), Option(-0.5, 0.2), Option(-1.0, 0.1), Option(-2.0, 9.0), Option(-3.0, np.inf))
    assert undominated(Problem((options,)), 1.0) == [[0, 1]]
    assert undominated(Problem((options, options), ties=(((0, 2), (1, 2)),)), 1.0) == [[0, 1, 2], [0, 1, 2]]


def test_a_tie_with_an_option_over_the_budget_takes_neither():
    groups = ((Option(0.0, 0.0), Option(-5.0, 0.1)), (Option(0.0, 0.0), Option(-1.0, 5.0)))
    assert solve(Problem(groups), 1.0).picks == (1, 0)
    assert solve(Problem(groups, ties=(((0, 1), (1, 1)),)), 1.0).picks == (0, 0)


def test_what_cannot_be_is_refused():
    over = ((Option(0.0, 0.5),), (Option(0.0, 0.6), Option(1.0, 0.7)))
    assert isinstance(solve(Problem(over), 1.0), Refusal)
    assert "group 1" in solve(Problem(over), 0.55).reason
    assert solve(Problem(over), 1.2).picks == (0, 0)
    assert solve(Problem(()), 0.0).picks == ()


def test_the_budget_is_held_to_the_last_bit():
    groups = tuple((Option(0.0, 0.0), Option(-1.0, 0.1)) for _ in range(10))
    for count in range(11):
        found = solve(Problem(groups), 0.1 * count)
        assert sum(found.picks) in (count - 1, count)
        assert found.loss <= 0.1 * count


def test_time_that_runs_out_is_said():
    problem = Problem(random_groups(5, 60, 30))
    found = solve(problem, 0.02, seconds=0.0)
    assert isinstance(found, Refusal) or not found.finished or found.gap <= 1e-4
