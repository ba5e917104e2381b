"""Without measurements a GPU's kernels are chosen by what the spec says."""

from __future__ import annotations

import pytest
from lowering_cases import BIAS, SEEN, Case, opened

from attnopt.codegen import Sdpa, TritonPrefill
from attnopt.plan.choose import applicable
from attnopt.plan.prediction import predicted

OURS = {
    "softmax causal & window(4)": "triton-prefill",
    "softmax softcap(30.0)": "triton-prefill",
    "softmax add((k - q) * 0.5) causal": "triton-prefill",
    f"softmax causal & {SEEN}": "triton-prefill",
    "softmax sink(0.5)": "triton-prefill",  # no library kernel has a sink
    "softmax": "sdpa",
    "softmax scale(0.25) causal": "sdpa",
    f"softmax scale(0.25) {SEEN}": "sdpa",
    f"softmax scale(0.25) add({BIAS})": "sdpa",
}


@pytest.mark.parametrize("line", OURS)
def test_on_a_gpu(line):
    host, site = opened(Case(line), "torch")
    fits, _ = applicable(site, host, "torch", 0, "gpu")
    lowering, why = predicted(site, fits, "gpu")
    assert (lowering.name, why.startswith("predicted: ")) == (OURS[line], True)


def test_on_a_cpu_there_are_no_triton_kernels():
    host, site = opened(Case("softmax causal & window(4)"), "torch")
    fits, refused = applicable(site, host, "torch", 0)
    assert "triton-prefill" not in {*(x.name for x in fits), *(choice.kernel for choice in refused)}
    assert predicted(site, [Sdpa(), TritonPrefill()], "cpu")[0] == Sdpa()
