"""Models of one linear layer, in both hosts, with the same weights."""

from __future__ import annotations

import torch

from attnopt.hosts.single_linear import single_linear


def test_both_hosts_compute_the_same():
    x = torch.randn(5, 24)
    results = []
    for name in ("torch", "onnx"):
        host = single_linear(name, 24, 16)
        results.append(host.runner()({host.graph.inputs[0].name: x})[0])
    assert results[0].shape == (5, 16)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
