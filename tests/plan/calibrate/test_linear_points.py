"""Linear layers that are timed compute what they should, in float32 and int8, on both runtimes."""

from __future__ import annotations

import pytest
import torch

from attnopt.hosts.single_linear import single_linear
from attnopt.plan.calibrate.linear_points import LINEARS, LinearPoint, linear_points


@pytest.mark.parametrize("kernel", LINEARS)
def test_what_is_timed_is_right(kernel):
    at = LinearPoint(kernel, rows=3, inputs=256, outputs=688)
    (result,) = at.call()()
    data = torch.randn(3, 256, generator=torch.Generator().manual_seed(3))
    host = single_linear("torch", 256, 688)
    (wanted,) = host.runner()({host.graph.inputs[0].name: data})
    assert result.shape == (3, 688)
    error = (torch.as_tensor(result) - wanted).abs().max()
    assert error < next(
        (most for word, most in (("int8", 0.1), ("8bits", 0.1), ("4bits", 0.5), ("whole", 0.5)) if word in kernel), 1e-4
    )
    assert (error > 1e-4) == (kernel not in ("linear", "ort-linear"))


def test_the_list_and_its_passes():
    assert linear_points() == linear_points()
    assert {p.kernel for p in linear_points()} == set(LINEARS)
    assert [p.family for p in LinearPoint("ort-linear-int8", 8, 64, 64).passes] == ["ort-linear-int8-inputs", "ort-linear-int8"]
    assert [p.family for p in LinearPoint("linear", 8, 64, 64).passes] == ["linear"]
