"""The standard Attention operator: any runtime, grouped heads as they are, the soft cap where no mask follows it."""

from __future__ import annotations

import pytest
from lowering_cases import BEYOND_SCALE_AND_BIAS, CASES, check

from attnopt.codegen.library.onnx_attention import OnnxAttention

TAKEN = ("softcap", "softcap_causal")


@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_reference_does_or_refuses(name):
    check(OnnxAttention(), CASES[name], "" if name in TAKEN else BEYOND_SCALE_AND_BIAS.get(name, ""), "any runtime")
