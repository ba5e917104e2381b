"""Errors say what, where and the next move, and suggest the nearest name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import attnopt
from attnopt import errors
from attnopt.errors import AccuracyError, AttnoptError, SpecSyntaxError, UnknownPass, UnknownTarget, UnreadableModel

ALL = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, AttnoptError)]


def test_what_where_and_the_next_move():
    failure = UnreadableModel("there is no file", where="a.onnx", next_move="Check the path.")
    assert str(failure) == "there is no file (a.onnx). Check the path."
    assert (failure.message, failure.where, failure.next_move) == ("there is no file", "a.onnx", "Check the path.")
    assert str(UnreadableModel("it ends here.")) == "it ends here."
    assert str(UnreadableModel("it ends here")) == "it ends here."


def test_the_nearest_name_is_suggested():
    known = ["h100", "h200", "cpu"]
    near = UnknownTarget("h20", known)
    assert str(near) == "'h20' is not a target. Did you mean 'h200'? `attnopt targets` lists all."
    assert str(UnknownTarget("toaster", known)) == "'toaster' is not a target. `attnopt targets` lists all."
    assert str(UnknownPass("fuse", iter(["fuse-attention"]))).endswith("`attnopt passes` lists all.")
    assert str(UnknownTarget("", known)).startswith("'' is not a target.")


def test_a_syntax_error_points_at_the_place():
    shown = str(SpecSyntaxError("softmax causl", 8, "a term")).splitlines()
    assert shown[0] == "expected a term at column 9"
    assert shown[1].index("causl") == shown[2].index("^")


def test_an_accuracy_error_keeps_its_numbers():
    failure = AccuracyError(0.5, 0.25, 1e-4)
    assert (failure.max_abs, failure.max_rel, failure.tolerance) == (0.5, 0.25, 1e-4)
    assert "0.5 absolute, 0.25 relative; 0.0001 is allowed" in str(failure)


@pytest.mark.parametrize("error", ALL, ids=lambda e: e.__name__)
def test_each_is_documented_and_ends_with_2(error):
    assert error.exit_code == 2
    assert inspect.getdoc(error)
    assert issubclass(error, AttnoptError)


def test_no_other_file_makes_errors_of_its_own():
    """Errors live in errors.py; what is caught inside the package says so in its docstring ("Internal: …")."""
    package = Path(attnopt.__file__).parent
    found = re.compile(r'^class (\w+)\((?:\w*Error|Exception|AttnoptError)\):\n    """(?!Internal)', re.MULTILINE)
    files = [f for f in package.rglob("*.py") if f.name != "errors.py"]
    assert {f.name: found.findall(f.read_text(encoding="utf-8")) for f in files} == {f.name: [] for f in files}
