"""Points: each kernel runs as its lowering writes it, and gives what the reference does."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen.tvm.availability import missing
from attnopt.hosts.single_attention import example
from attnopt.ir.reference import reference
from attnopt.plan.kernel_points import KERNELS, call, point, ready, refusal

SHAPE = {"b": 1, "h": 4, "g": 2, "q": 160, "k": 160, "d": 16, "e": 16}
BAND = "softmax scale(0.25) causal & window(16)"


ELSEWHERE = {"flex"} | ({"tvm-decode", "tvm-prefill"} if missing() else set())


@pytest.mark.sampled(6)
@pytest.mark.parametrize("kernel", sorted(set(KERNELS) - ELSEWHERE))  # which compiles for seconds, and has tests of its own
def test_what_is_timed_is_right(kernel):
    shape = SHAPE | ({"e": 32} if kernel.startswith("wide-values") else {"q": 4} if kernel == "tvm-decode" else {})
    at = point(BAND, shape, kernel)
    assert refusal(at) is None
    given = example(shape)
    (result,) = call(at)()
    wanted = reference(BAND, given["q"], given["k"], given["v"])
    torch.testing.assert_close(torch.as_tensor(result), wanted, atol=1e-4, rtol=1e-4)


def test_refusals_and_failures_are_left_out(monkeypatch):
    told = []
    group = [point("softmax scale(0.25)", SHAPE, kernel) for kernel in ("sdpa", "local-sdpa", "eager")]
    monkeypatch.setattr("attnopt.plan.kernel_points.call", lambda at: broken if at.kernel == "eager" else lambda: None)
    calls = ready(group, lambda at, why: told.append((at.kernel, why)))
    assert [at.kernel for at in calls] == ["sdpa"]  # local-sdpa refuses: there is no band
    assert told == [("eager", "no such instruction")]


def broken():
    raise RuntimeError("no such instruction\nat 0x0")


def test_a_point_says_what_it_is():
    at = point("softmax", SHAPE, "sdpa")
    assert str(at) == "sdpa: softmax float32 b=1 h=4 g=2 q=160 k=160 d=16 e=16"
    assert at.line == point("softmax", SHAPE, "eager").line
