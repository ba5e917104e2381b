"""com.microsoft::GroupQueryAttention: causal prompts, with a window and a soft cap."""

from __future__ import annotations

import pytest
from lowering_cases import CASES, Case, check

from attnopt.codegen.library.group_query_attention import GroupQueryAttention
from attnopt.ir.spec import parse

TAKEN = ("one_by_one", "one_key_head", "causal", "window", "window_of_one", "window_of_all", "softcap_causal", "softcap_window",
         "extreme_causal", "half")  # fmt: skip
REFUSED = {
    "causal_more_keys": "queries and keys differ in number",
    "causal_more_queries": "queries and keys differ in number",
    "causal_other_widths": "values have another width than keys",
    "causal_narrow": "the head width is no multiple of 8",
    "distances": "biases",
    "extreme_bias": "biases",
}


@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_reference_does_or_refuses(name):
    not_causal = f"mask '{parse(CASES[name].spec).mask}' is not causal with at most a window"
    check(GroupQueryAttention(), CASES[name], "" if name in TAKEN else REFUSED.get(name, not_causal))


@pytest.mark.parametrize(
    ("case", "runtime", "reason"),
    [
        (CASES["causal"], "other", "runtime other has no com.microsoft::GroupQueryAttention"),
        (Case("softmax causal", dtype="bfloat16"), "onnxruntime", "dtype bfloat16"),
        (Case("softmax causal & window(3) & window(4)"), "onnxruntime",
         "mask 'causal & window(3) & window(4)' is not causal with at most a window"),
        (Case("softmax causal softcap(1.5) scale(2.0)"), "onnxruntime",
         "score terms 'softcap(1.5) scale(2.0)' do not fit scale, then bias"),
    ],
)  # fmt: skip
def test_refusals(case, runtime, reason):
    check(GroupQueryAttention(), case, reason, runtime)
