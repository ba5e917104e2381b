"""Values wider than keys, computed piece by piece."""

from __future__ import annotations

import pytest
from lowering_cases import BEYOND_SCALE_AND_BIAS, CASES, Case, check

from attnopt.codegen.library.sdpa import Sdpa
from attnopt.codegen.library.wide_values import WideValues

WIDE = {
    "twice": Case("softmax scale(0.25)", width=(8, 16)),
    "three times": Case("softmax scale(0.25) causal", width=(8, 24)),
    "grouped": Case("softmax scale(0.25) causal", heads=(6, 2), width=(8, 16)),
    "one key head": Case("softmax scale(0.25)", heads=(4, 1), width=(8, 16), lengths=(3, 12)),
}


@pytest.mark.parametrize("name", WIDE)
def test_computes_what_the_reference_does(name):
    check(WideValues(), WIDE[name])
    assert WideValues().name == f"wide-values-{Sdpa().name}"


@pytest.mark.parametrize("name", ["plain", "other_widths"])
def test_refuses_values_that_are_no_wider(name):
    keys, values = CASES[name].width
    assert name not in BEYOND_SCALE_AND_BIAS
    check(WideValues(), CASES[name], f"values of width {values} are no multiple of keys of width {keys}")
