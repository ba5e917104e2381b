"""TVM's decode kernel in the graph of a model: taken for a few queries whose number is known, and right with a cache of any length."""

from __future__ import annotations

import pytest
import torch
from lowering_cases import CASES, opened
from torch import Tensor, nn

import attnopt
from attnopt.codegen.tvm.availability import missing
from attnopt.codegen.tvm.lowerings.tvm_decode import TvmDecode

pytestmark = pytest.mark.skipif(missing() is not None, reason="TVM is not installed")


class Step(nn.Module):
    """x [B, 32], keys and values [B, 4, L, 8] -> [B, 32]: the new token sees all, under a soft cap."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 1, -1)) for layer in (self.q, self.k, self.v))
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        scores = 5.0 * torch.tanh(q @ k.mT * 0.25 / 5.0)
        return self.o((scores.softmax(-1) @ v).flatten(1))


def example(batch: int, length: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 32), torch.randn(batch, 4, length, 8), torch.randn(batch, 4, length, 8)


def test_a_step_with_a_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("attnopt.plan.choose.LOWERINGS", (TvmDecode(),))
    model = Step().eval()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {"x": {0: batch}, "keys": {0: batch, 2: length}, "values": {0: batch, 2: length}}
    fast = attnopt.optimize(model, example(2, 40), target="cpu", select="always", dynamic_shapes=shapes)
    (site,) = fast.report.sites
    assert site.kernel == "tvm-decode"
    loaded = attnopt.load(fast.export(tmp_path / "step.pt2"))
    for batch, length in ((3, 5), (2, 100)):
        given = example(batch, length)
        for run in (fast, loaded):
            torch.testing.assert_close(run(*given), model(*given), atol=1e-5, rtol=1e-5)


def test_refusals():
    _, site = opened(CASES["causal"], "torch")
    said = TvmDecode().supports(site, "torch").reason
    assert said.endswith("queries; this kernel is for a number that is known to be at most 16")
    assert TvmDecode().supports(site, "onnxruntime").reason == "runtime onnxruntime has no TVM kernels"
