"""A whole model with the kernel in it: verified when it is made, and right at other lengths and from a file."""

from __future__ import annotations

import torch
from softcapped_window import Window

import attnopt


def test_a_model_runs_the_kernel(tmp_path):
    model = Window().eval()
    fast = attnopt.optimize(model, (torch.randn(2, 40, 32),), target="h200")
    (site,) = fast.report.sites
    assert site.kernel == "triton-prefill"
    assert 0 < fast.report.difference.max_rel < 1e-5  # not the reference itself
    x = torch.randn(1, 33, 32)
    loaded = attnopt.load(fast.export(tmp_path / "fast.pt2"))
    for run in (fast, loaded):
        torch.testing.assert_close(run(x), model(x), atol=1e-5, rtol=1e-5)
