"""How large a score can become: bounds that hold, the rule that follows from them, and what the kernel multiplies."""

from __future__ import annotations

import math

import pytest
import torch

from attnopt.codegen.triton.prefill import Form, emit, supports
from attnopt.codegen.triton.row_norms import BITS, is_static, refusal, score_bound
from attnopt.codegen.triton.tiles import Tile
from attnopt.ir.reference import rows_of
from attnopt.ir.spec import parse

GAINS = {"g": 3.0, "f": 2.0}


@pytest.mark.parametrize(
    ("line", "bound"),
    [
        ("softmax", math.inf),
        ("softmax norm(rms)", 1.02 * 16),
        ("softmax norm(layer) scale(-0.5)", 1.02 * 8),
        ("softmax norm(l2, q_gain=g, k_gain=f) scale(10.0)", 1.02 * 60),
        ("softmax norm(rms, q_gain=unknown)", math.inf),
        ("softmax norm(rms, on=k)", math.inf),
        ("softmax norm(longest)", math.inf),
        ("softmax softcap(30.0)", 30.0),
        ("softmax norm(l2) softcap(30.0)", 30 * math.tanh(1.02 / 30)),
        ("softmax softcap(30.0) scale(2.0)", 60.0),
        ("softmax norm(l2) scale(load(t, h))", math.inf),
        ("softmax norm(l2) add(-0.1 * (q - k))", math.inf),
        ("softmax mod(square) softcap(5.0)", 5.0),
    ],
)
def test_bounds(line, bound):
    assert score_bound(parse(line), 16, GAINS) == pytest.approx(bound)


@pytest.mark.parametrize(
    "line", ["softmax norm(rms, q_gain=g, k_gain=f) scale(0.3)", "softmax norm(l2, q_gain=g) scale(5.0) softcap(9.0)"]
)
def test_no_score_is_larger(line):
    """Rows that are parallel, in the channel of the largest gain, come near the bound."""
    spec, q = parse(line), torch.randn(1, 2, 8, 16, dtype=torch.float64)
    q[:, :, 0] = 0.0
    q[:, :, 0, 3] = 1e4
    operands = {"g": torch.full((16,), 3.0).double(), "f": torch.full((16,), -2.0).double()}
    largest = float(rows_of(spec, q, q, q, {n: operands[n] for n in spec.operands}).scores.abs().max())
    bound = score_bound(spec, 16, GAINS)
    assert 0.9 * bound < largest <= bound


@pytest.mark.parametrize(("dtype", "largest"), [("float32", 33.27), ("bfloat16", 33.27), ("float16", 9.70)])
def test_the_rule(dtype, largest):
    assert BITS[dtype] * math.log(2) == pytest.approx(largest, abs=0.01)
    assert is_static(parse(f"softmax softcap({largest})"), 64, dtype, {})
    assert not is_static(parse(f"softmax softcap({largest + 0.1})"), 64, dtype, {})


def source(line, dtype="bfloat16", limits=()):
    spec = parse(line)
    form = Form(64, 64, dtype, tuple((name, "float32") for name in spec.operands), limits=limits)
    assert supports(spec, form) is None
    return emit(spec, form, Tile(64, 64, 4, 2))


def test_a_constant_maximum_has_no_rescaling():
    text = source("softmax norm(rms, q_gain=g, k_gain=f) scale(0.125) causal", limits=(("g", 1.5), ("f", 2.0)))
    assert "b_p = tl.exp2(b_s * STATIC_SCALE)" in text
    assert [part for part in ("tl.max(", "b_decay", "b_top =") if part in text] == []
    assert "return 0.18033688011112042 * tl.cast(tl.load(p_g + h * s_g_0 + d * s_g_1), tl.float32)" in text
    assert "g, g.stride(0) if g.ndim > 1 else 0, g.stride(-1) if g.shape[-1] > 1 else 0" in text


def test_unknown_or_extreme_gains_keep_the_running_maximum():
    line = "softmax norm(rms, q_gain=g, k_gain=f) scale(0.125) causal"
    for limits in ((), (("g", 1.5),), (("g", 1.5), ("f", 3.0))):
        text = source(line, limits=limits)
        assert "b_decay" in text and "STATIC" not in text
        assert "return 0.125 * tl.cast(" in text
    assert "b_decay" in source(line, "float16", (("g", 1.5), ("f", 2.0)))  # float16 has a narrower range than bfloat16


def test_what_depends_on_all_rows_is_refused():
    said = refusal(parse("softmax norm(longest)"))
    assert said is not None
    assert said.reason == "norm(longest) depends on all rows of a head"
