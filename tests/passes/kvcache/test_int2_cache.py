"""2-bit cache: what `cache(k=int2, v=int2, group=…, scales=fp16)` means, in both hosts, four codes in a byte."""

from __future__ import annotations

import pytest
from rounded_steps import SEEN, check_step, opened, whole

from attnopt.passes import Int2Cache


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("variant", ["2-bit", "2-bit keys by channel"])
@pytest.mark.parametrize("group", [4, 32])
def test_equal_to_the_reference_with_the_clause(kind, variant, group):
    made, _, _ = check_step(Int2Cache(group=group), opened(kind), variant, SEEN)
    assert {s.shape[-1] for s in made.input_specs if str(s.dtype) == "torch.uint8"} == {2}


def test_refusals_name_the_nearest():
    refused = Int2Cache().propose(whole(opened("torch", width=6)), None)
    assert refused.reason == "keys: rows of 6 channels cannot be packed four to a byte; the nearest widths are 4 and 8"
