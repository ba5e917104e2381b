"""scaled_dot_product_attention, with grouped heads as they are and repeated."""

from __future__ import annotations

import pytest
from lowering_cases import BEYOND_SCALE_AND_BIAS, CASES, Case, check

from attnopt.codegen.library.sdpa import Sdpa


@pytest.mark.sampled(20)
@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_reference_does_or_refuses(name):
    check(Sdpa(), CASES[name], BEYOND_SCALE_AND_BIAS.get(name, ""))


@pytest.mark.parametrize("name", CASES)
def test_repeats_grouped_heads_where_there_are_any(name):
    case = CASES[name]
    no_groups = "there are no grouped heads to repeat"
    check(Sdpa(grouped=False), case, BEYOND_SCALE_AND_BIAS.get(name, "") if case.heads[0] != case.heads[1] else no_groups)


def test_bfloat16():
    check(Sdpa(), Case("softmax scale(0.25) causal", dtype="bfloat16"))


def test_other_runtimes_have_none():
    check(Sdpa(), CASES["plain"], "runtime onnxruntime has no scaled_dot_product_attention", "onnxruntime")
