"""What constants decide is written out; what nothing reads is left out; all other lines stay as they were."""

from __future__ import annotations

import pytest

from attnopt.codegen.source_edits import Edit, applied
from attnopt.codegen.specialise import Slot, decide, pruned, repeated, specialise, written_out

TEMPLATE = '''\
import math
import numpy as np

FLAG = constexpr(False)
SIZE = constexpr(1)
UNUSED = constexpr(3)


@jit
def hole(x, y, more):
    """Nothing."""
    return x


@jit
def kernel(p_x, p_y, more, size, spare):
    # Stays.
    total = 0.0  # shape
    extra = spare * 2
    if FLAG:
        # Goes with the branch.
        total += size
    for i in range(size):
        if FLAG and size:
            total += 1
        elif i == 3:
            total += 2
        total += hole(p_x, p_y, more) * SIZE
    return total


def launch(x, y, more=None, spare=7):
    return kernel[(1,)](x, y, more, math.pi, spare)
'''


def run(values, holes=None, slots=()):
    return specialise(TEMPLATE, values, holes or {}, slots, keep="launch")


def test_a_flag_that_is_off():
    assert (
        run({"FLAG": False, "SIZE": 4}, slots=[Slot("more", (), ())])
        == '''\
import math

SIZE = constexpr(4)


@jit
def hole(x):
    """Nothing."""
    return x


@jit
def kernel(p_x, size):
    # Stays.
    total = 0.0  # shape
    for i in range(size):
        if i == 3:
            total += 2
        total += hole(p_x) * SIZE
    return total


def launch(x, y, spare=7):
    return kernel[(1,)](x, math.pi)
'''
    )


def test_a_flag_that_is_on_and_a_hole_with_operands():
    holes = {"hole": "@jit\ndef hole(x, y, more):\n    return x + load(p_a) * s_b\n"}
    text = run({"FLAG": True}, holes, [Slot("more", ("p_a", "s_b"), ("p_a", "s_b"))])
    assert "    # Goes with the branch.\n    total += size\n" in text
    assert "def hole(x, p_a, s_b):\n    return x + load(p_a) * s_b\n" in text
    assert "def kernel(p_x, p_a, s_b, size):" in text
    assert "hole(p_x, p_a, s_b) * SIZE" in text
    assert "        if size:\n" in text  # what a constant does not decide stays


@pytest.mark.parametrize(
    ("before", "values", "after"),
    [
        ("if A:\n    x\nelse:\n    y\nz\n", {"A": True}, "x\nz\n"),
        ("if A:\n    x\nelse:\n    y\nz\n", {"A": False}, "y\nz\n"),
        ("if not A:\n    x\nz\n", {"A": True}, "z\n"),
        ("if A or B:\n    x\nelse:\n    y\n", {"A": True}, "x\n"),
        ("if A and B:\n    x\nelse:\n    y\n", {"A": False}, "y\n"),
        ("if A and B:\n    x\n", {"A": True}, "if B:\n    x\n"),
        ("if not A or B:\n    x\n", {"A": True}, "if B:\n    x\n"),
        ("if A == 0:\n    x\nelse:\n    y\n", {"A": 0}, "x\n"),
        ("if u:\n    x\nelif A:\n    y\nelse:\n    z\n", {"A": True}, "if u:\n    x\nelse:\n    y\n"),
        ("if u:\n    x\nelif A:\n    y\nelse:\n    z\n", {"A": False}, "if u:\n    x\nelse:\n    z\n"),
        ("if u:\n    x\nelif A:\n    y\nw\n", {"A": False}, "if u:\n    x\nw\n"),
        ("if A:\n    x\nelif u:\n    y\nelse:\n    z\n", {"A": False}, "if u:\n    y\nelse:\n    z\n"),
        ("if u:\n    if A:\n        # why\n        x\n\n        y\n", {"A": True}, "if u:\n    # why\n    x\n\n    y\n"),
        ("for P in tl.static_range(A, 2):\n    if P:\n        x\n    y\n", {"A": 1}, "x\ny\n"),
        ("if A:\n    x\n    if B:\n        y\nif not B:\n    z\n", {"A": True, "B": False}, "x\nz\n"),
        ("f(x, key=A)\n", {"A": False}, "f(x)\n"),
        ("f(x, key=A)\n", {"A": True}, "f(x, key=A)\n"),
        (
            "for P in tl.static_range(A, 2):\n    if P:\n        x\n",
            {"A": 0},
            "for P in tl.static_range(A, 2):\n    if P:\n        x\n",
        ),
    ],
)
def test_branches(before, values, after):
    known = dict(values)
    assert repeated(before, lambda text: decide(text, known)) == after


@pytest.mark.parametrize(
    ("names", "after"),
    [
        ((), "def f(a, b=1):\n    g(a, c)\n"),
        (("x",), "def f(a, x, b=1):\n    g(a, x, c)\n"),
        (("x", "y"), "def f(a, x, y, b=1):\n    g(a, x, y, c)\n"),
    ],
)
def test_slots(names, after):
    assert written_out("def f(a, more=None, b=1):\n    g(a, more, c)\n", Slot("more", names, names)) == after


def test_a_last_argument_goes_with_the_comma_before_it():
    assert written_out("f(a,\n  more)\n", Slot("more", (), ())) == "f(a)\n"


def test_chains_of_names_that_nothing_reads():
    text = "@jit\ndef f(a, b):\n    c = b\n    d = c\n    return a\n\n\nf(1, 2)\n"
    assert repeated(text, lambda t: pruned(t, "g")) == "@jit\ndef f(a):\n    return a\n\n\nf(1)\n"


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ("a = 1\n    return a", False),
        ("a = a + 1\n    return a", True),
        ("if c:\n        a = 1\n    return a", True),
        ("b = a\n    a = 1\n    return a + b", True),
    ],
)
def test_a_parameter_that_is_set_before_it_is_read(body, kept):
    text = repeated(f"@jit\ndef f(a, c):\n    {body} + c\n\n\nf(1, 2)\n", lambda t: pruned(t, "g"))
    assert ("def f(a, c)" in text, "f(1, 2)" in text) == (kept, kept)


def test_edits():
    assert applied("abcdef", [Edit(1, 2, "X"), Edit(3, 5, "")]) == "aXcf"
    assert applied("a\n  b\nc\n", [Edit(4, 5, "")]) == "a\nc\n"
