"""The spelled-out attention computes what the reference does, in both hosts."""

from __future__ import annotations

import pytest
from lowering_cases import CASES, check

from attnopt.codegen.spelled_out import SpelledOut

SOME = (
    "plain",
    "causal_more_keys",
    "grouped",
    "causal_padding",
    "padding_mean",
    "two_biases",
    "softcap",
    "other_widths",
    "first_row_mean",
)


@pytest.mark.parametrize("host", ["torch", "onnx"])
@pytest.mark.parametrize("name", SOME)
def test_as_the_reference(host, name):
    check(SpelledOut(host), CASES[name])


def test_what_it_cannot_say():
    check(SpelledOut("onnx"), CASES["sigmoid"], "the normaliser is sigmoid, not softmax")
    check(SpelledOut("torch"), CASES["padding"], "a row without visible key must be zero; a plain softmax makes it no number")
    assert (SpelledOut("torch").name, SpelledOut("onnx").name) == ("eager", "ort-eager")
