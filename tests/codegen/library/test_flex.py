"""FlexAttention. Most cases run its eager form, which takes the same generated source; some are compiled."""

from __future__ import annotations

import pytest
import torch
from lowering_cases import CASES, Case, check

from attnopt.codegen.library.flex import Flex

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
NOTHING = "nothing here that FlexAttention does better than scaled_dot_product_attention"
MEAN = "empty rows must average the values; FlexAttention returns zero"
REFUSED = {
    **dict.fromkeys((
        "plain", "unscaled", "other_widths", "one_query", "one_by_one", "more_queries", "grouped", "one_key_head", "causal",
        "causal_other_widths", "padding", "bias", "bias_of_a_head", "two_biases", "bias_and_mask", "constant_bias",
        "extreme_logits", "extreme_causal", "half", "tensor_scale", "sink", "sigmoid",
    ), NOTHING),
    **dict.fromkeys((
        "causal_more_keys", "causal_more_queries", "padding_mean", "causal_padding", "first_row_mean",
        "extreme_padding", "half_padding", "length",
    ), MEAN),
    **dict.fromkeys(("narrow", "causal_narrow"), "FlexAttention needs heads of at least 16 channels"),
}  # fmt: skip


@pytest.mark.sampled(20)
@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_reference_does_or_refuses(name):
    with torch.compiler.set_stance("force_eager"):
        check(Flex(), CASES[name], REFUSED.get(name, ""))


@pytest.mark.parametrize("name", ["window", "softcap_bias"])
def test_compiled(name):
    check(Flex(), CASES[name])


@pytest.mark.parametrize(
    ("case", "runtime", "reason"),
    [
        (CASES["window"], "onnxruntime", "runtime onnxruntime has no FlexAttention"),
        (Case("softmax softcap(1.5) causal", dtype="float64"), "torch", "dtype float64"),
        (Case("softmax window(3) & k < size(k) empty(zero)"), "torch", "a score term or a length that FlexAttention cannot say"),
    ],
)
def test_refusals(case, runtime, reason):
    check(Flex(), case, reason, runtime)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    check(Flex(), CASES["window"], "FlexAttention needs a C++ compiler (install g++), and none was found")
