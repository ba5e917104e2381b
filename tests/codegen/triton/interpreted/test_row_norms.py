"""Normalised queries and keys inside the kernel, with a running maximum and with a constant one, up to the largest gains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnopt.codegen.emitted import load
from attnopt.codegen.triton.prefill import emit, supports
from attnopt.codegen.triton.tiles import Tile
from attnopt.codegen.triton.triton_attention import form_of
from attnopt.ir.reference import attend
from attnopt.ir.spec import parse


def run(line, q, k, v, operands, limits=(), lse=True):
    spec = parse(line)
    form = replace(form_of(q, v.shape[3], {name: operands[name] for name in spec.operands}, lse), limits=limits)
    assert supports(spec, form) is None
    text = emit(spec, form, Tile(16, 16, 1, 1))
    poisoned = torch.full((*q.shape[:3], v.shape[3]), torch.nan, dtype=q.dtype)
    return load(text).attention(q, k, v, *(operands[name] for name in spec.operands), o=poisoned), "STATIC" in text


def check(line, width, operands, limits, static, gain=1.0, dtype=torch.float32, allowed=3e-5):
    q, k, v = torch.randn(1, 4, 20, width) * 5, torch.randn(1, 2, 20, width) - 1, torch.randn(1, 2, 20, 16)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    operands = {name: (x * gain).to(dtype) for name, x in operands.items()}
    (o, lse), constant = run(line, q, k, v, operands, limits)
    right = attend(line, q.double(), k.double(), v.double(), **{name: x.double() for name, x in operands.items()})
    assert constant == static
    torch.testing.assert_close(o.double(), right.output, atol=allowed, rtol=allowed)
    torch.testing.assert_close(lse.double(), right.lse, atol=20 * allowed, rtol=allowed)


@pytest.mark.parametrize("limits", [(), (("g", 2.0), ("f", 3.0))])
@pytest.mark.parametrize(
    ("line", "shapes"),
    [
        ("softmax norm(rms, q_gain=g, k_gain=f) scale(0.25) causal", {"g": (16,), "f": (16,)}),
        (
            "softmax norm(l2, q_gain=g, k_gain=f) scale(4.0) softcap(20.0) causal & window(7) sink(0.5)",
            {"g": (4, 1), "f": (2, 24)},
        ),
        ("softmax norm(layer, q_gain=g, k_gain=f) scale(0.2) k < q", {"g": (4, 24), "f": (24,)}),
    ],
)
def test_norms_and_gains(line, shapes, limits):
    operands = {name: torch.rand(shape) * 2 - 1 for name, shape in shapes.items()}
    width = shapes["f"][-1]
    check(line, width, operands, limits, static=bool(limits) or "softcap" in line)


def test_one_side_and_centred_rows():
    check("softmax norm(rms, on=k, center=yes, k_gain=f) scale(0.05)", 16, {"f": torch.rand(16)}, (), static=False)


@pytest.mark.parametrize(("gain", "static"), [(1.4, True), (40.0, False)])
def test_extreme_gains(gain, static):
    """At the bound the weights of a row reach from 2^-48 to 2^48; beyond it the maximum runs along."""
    operands = {"g": torch.ones(16), "f": torch.ones(16)}
    limits = (("g", gain), ("f", gain))
    check("softmax norm(rms, q_gain=g, k_gain=f) scale(1.0)", 16, operands, limits, static, gain, allowed=2e-4)


def test_half_precision_at_its_bound():
    operands = {"g": torch.ones(16), "f": torch.ones(16)}
    line = "softmax norm(rms, q_gain=g, k_gain=f) scale(0.58) causal"
    check(line, 16, operands, (("g", 1.0), ("f", 1.0)), True, dtype=torch.float16, allowed=8e-3)
