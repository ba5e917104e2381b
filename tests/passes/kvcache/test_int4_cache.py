"""int4 cache: what `cache(k=int4, v=int4, group=…, scales=fp16)` means, in both hosts, two codes in a byte."""

from __future__ import annotations

import pytest
from rounded_steps import SEEN, check_step, opened, rewritten, whole

from attnopt.passes import Int4Cache


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("variant", ["int4", "int4 values", "int4 keys by channel"])
@pytest.mark.parametrize("group", [4, 32])
def test_equal_to_the_reference_with_the_clause(kind, variant, group):
    made, candidate, _ = check_step(Int4Cache(group=group), opened(kind), variant, SEEN)
    assert "values" in variant or next(iter(candidate.cached.values())).startswith(f"cache(k=int4, v=int4, group={group}")
    codes = next(s for s in made.input_specs if str(s.dtype) == "torch.uint8")
    assert codes.shape[-1] == 4


def test_description_counts_bytes_with_scales():
    _, candidate = rewritten(Int4Cache(), opened("torch"), "int4")
    assert candidate.description == (  # 4 rows of 4 bytes of codes, and a scale and a zero point in float16
        "past keys and values of 1 layers in int4: 128 -> 32 bytes per token; they come and go as codes, scales and zeros"
    )


def test_refusals_name_the_nearest():
    refused = Int4Cache(group=3).propose(whole(opened("torch")), None)
    assert refused.reason == "keys: groups of 3 channels do not divide rows of 8; the nearest that do are [2, 4]"
