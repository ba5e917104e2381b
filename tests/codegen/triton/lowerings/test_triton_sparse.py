"""Sparse attention in the graph of a model, by Triton's kernels: which sites are taken, and why others are not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from self_attention import SelfAttention

from attnopt.codegen import LOWERINGS
from attnopt.codegen.library.flex import Flex
from attnopt.codegen.library.sdpa import Sdpa
from attnopt.codegen.triton.lowerings.triton_prefill import TritonPrefill
from attnopt.codegen.triton.lowerings.triton_sparse import TritonSparse
from attnopt.hosts.fx import FxHost, capture
from attnopt.ir.spec import parse
from attnopt.patterns import recognise


@pytest.mark.parametrize(
    ("line", "runtime", "why"),
    [
        ("softmax causal pooled_blocks(128, 64, share=0.3, first=1)", "torch", None),
        ("softmax causal block_topk(64, 8) delta(64)", "torch", None),
        ("softmax causal & (near_blocks(256, 4) | power_blocks(256) | global(256))", "torch", None),
        ("softmax causal pooled_blocks(32, 32, share=0.3)", "torch", "no multiples of 64 x 64"),
        ("softmax causal pooled_blocks(64, 64, skip=20.0)", "torch", None),
        ("softmax causal pooled_blocks(192, 64, skip=20.0)", "torch", "not of 192 x 64"),
        ("softmax causal & window(9)", "torch", "no tile is left out but by bounds"),
        ("softmax causal block_topk(64, 8)", "onnxruntime", "has no Triton kernels"),
    ],
)
def test_what_is_taken(line, runtime, why):
    (site,) = recognise(FxHost.from_captured(capture(SelfAttention().eval(), (torch.randn(1, 70, 64),))).graph).sites
    found = TritonSparse().supports(replace(site, spec=parse(line)), runtime)
    assert found is None if why is None else found is not None and why in found.reason


def test_other_kernels_say_why_not():
    (site,) = recognise(FxHost.from_captured(capture(SelfAttention().eval(), (torch.randn(1, 70, 64),))).graph).sites
    for line, slot in (("block_topk(64, 8)", "selection"), ("window(8) delta(4)", "correction")):
        sparse = replace(site, spec=parse(f"softmax causal & {line}" if "window" in line else f"softmax causal {line}"))
        for kernel in LOWERINGS:
            if "sparse" not in kernel.name and kernel.host == "torch":
                found = kernel.supports(sparse, "torch")
                assert found is not None, kernel.name
        said = [kernel.supports(sparse, "torch").reason for kernel in (Sdpa(), Flex(), TritonPrefill())]
        assert any(slot in reason for reason in said), said
