"""The list of shapes is fixed and large enough, and its parts do not meet."""

from __future__ import annotations

import itertools

from attnopt.ir.spec import parse
from attnopt.plan.calibrate.calibrate import PART
from attnopt.plan.calibrate.point_grid import groups, lines, share


def test_it_is_the_same_each_time_and_every_line_parses():
    first, second = (list(lines()) for _ in range(2))
    assert first == second
    assert len({(line, str(shape)) for line, shape in first}) == len(first) > 100
    assert all(
        parse(line).scale == shape["d"] ** -0.5 or abs(parse(line).scale - shape["d"] ** -0.5) < 1e-6 for line, shape in first
    )


def test_a_line_is_fitted_or_judged_with_all_its_kernels():
    parts = {g[0].line: {share(p.spec, p.shape, PART) for p in g} for g in groups()}
    assert all(len(found) == 1 for found in parts.values())
    sizes = [sum(found == {part} for found in parts.values()) for part in range(PART)]
    assert min(sizes) > len(parts) / PART / 2  # no part is empty


def test_kernels_of_one_line_stand_together():
    for group in itertools.islice(groups(), 5):
        assert len({p.line for p in group}) == 1
        assert len({p.kernel for p in group}) == len(group) > 5
