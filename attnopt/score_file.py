"""A user's score for the command line: a function in a Python file.

--quality score.py:accuracy   ->   accuracy(inputs, outputs), both named tensors of one batch; a number, or one for each sample
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from attnopt.errors import BudgetError
from attnopt.plan.judge.quality import Score


def score_in(given: str) -> Score:
    """Raises BudgetError where there is no such file or function; what the file itself raises passes through."""
    path, colon, name = given.rpartition(":")
    if not colon or not Path(path).is_file():
        raise BudgetError(f"there is no score in '{given}'", next_move="Give FILE.py:FUNCTION.")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise BudgetError(f"'{path}' is no Python file", next_move="Give FILE.py:FUNCTION.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        raise BudgetError(f"'{path}' has no function '{name}'", next_move="Give FILE.py:FUNCTION.")
    return found  # type: ignore[no-any-return]
