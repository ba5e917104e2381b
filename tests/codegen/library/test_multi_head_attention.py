"""com.microsoft::MultiHeadAttention: masks and biases as one tensor, grouped heads repeated."""

from __future__ import annotations

import pytest
from lowering_cases import BEYOND_SCALE_AND_BIAS, CASES, Case, check

from attnopt.codegen.library.multi_head_attention import MultiHeadAttention


@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_reference_does_or_refuses(name):
    check(MultiHeadAttention(), CASES[name], BEYOND_SCALE_AND_BIAS.get(name, ""))


def test_refusals():
    check(MultiHeadAttention(), CASES["plain"], "runtime other has no com.microsoft::MultiHeadAttention", "other")
    check(MultiHeadAttention(), Case("softmax", dtype="bfloat16"), "dtype bfloat16")
